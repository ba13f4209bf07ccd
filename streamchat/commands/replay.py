"""`streamchat replay FILE...`: run scripted conversations through one cache, check every turn, and write a report."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base import paths
from streamchat.base.atomic_files import write_json
from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.requests import Stop
from streamchat.base.sanitize import one_line, printable
from streamchat.base.signals import on_signals
from streamchat.cli import flags
from streamchat.config.loader import Configuration
from streamchat.config.settings import setting_fields
from streamchat.replay.durations import parse_duration
from streamchat.replay.script import FORMATS, Script, read_scripts

if TYPE_CHECKING:
    from streamchat.replay.run import Run, RunFolder
    from streamchat.replay.runner import Plan

SAVED_ARGUMENTS = (
    "files",
    "format",
    "strict",
    "fresh",
    "teacher_forced",
    "repeat",
    "duration",
    "max_turns",
    "max_drift",
    "workers",
    "ray",
    "chaos",
)
"""Arguments that `--resume-run` takes from the resumed run."""
NEWER = ("workers", "ray", "chaos")
"""Those that earlier versions did not have."""
REPLACED = ("duration", "max_turns", "workers", "ray")
"""Those that a new value overrides."""

HELP = "run scripted conversations through the cache, check every turn, and write a report"
DESCRIPTION = (
    "Replay the scripted turns in one endless conversation; check after every turn that the cache is "
    "correct, that memory does not grow, and that nothing gets slower; write report.json, report.html and "
    "turns.jsonl. Exit code 0 if all invariants hold, 4 if one does not."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("files", nargs="*", metavar="FILE", help="scripts: chats, ChatGPT's export, MT-Bench, or text")
    own = parser.add_argument_group("replay")
    own.add_argument(
        "--format", choices=FORMATS, default="auto", help="format of the files; auto detects it (default: auto)"
    )
    own.add_argument(
        "--strict", action="store_true", help="fail at the start if a line is invalid, instead of skipping it"
    )
    own.add_argument("--fresh", action="store_true", help="start a new conversation for every record of a script")
    own.add_argument(
        "--teacher-forced", action="store_true", help="feed the answers of the script instead of generating replies"
    )
    own.add_argument(
        "--repeat", default="1", metavar="N", help="number of passes over the files, or 'forever' (default: 1)"
    )
    own.add_argument("--duration", metavar="TIME", help="stop starting new turns after this time (90s, 30m, 8h, 2d)")
    own.add_argument("--max-turns", type=int, metavar="N", help="stop after N turns")
    own.add_argument(
        "--max-drift",
        type=float,
        default=25.0,
        metavar="PERCENT",
        help="maximum allowed growth of turn times over the last 400 turns (default: 25)",
    )
    own.add_argument("--out", metavar="FOLDER", help="new folder for the report (default: one in the state folder)")
    own.add_argument("--resume-run", metavar="FOLDER", help="resume a run that was stopped")
    own.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="replay every file (with --fresh: every record) as a separate conversation, N processes at a time",
    )
    own.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="replay like --workers on a Ray cluster, with one worker per CPU or --workers N; 'local' starts a cluster "
        "here (needs ray)",
    )
    own.add_argument(
        "--chaos",
        type=int,
        metavar="SEED",
        help="disturb the run at moments drawn from SEED: pause it, set its clock, fill the disk, and more; then "
        "check that no finished turn was lost",
    )
    # flags for the measured process: the pipe for its reports, and whether it only opens the session
    own.add_argument("--chaos-link", type=int, help=argparse.SUPPRESS)
    own.add_argument("--chaos-check", action="store_true", help=argparse.SUPPRESS)
    own.add_argument("--tui", action="store_true", help="watch the run in the app")
    own.add_argument("--quiet", action="store_true", help="no progress bar and no line per turn")
    flags.add_setting_flags(
        parser,
        (
            *("model", "adapter", "device", "dtype", "weights", "kernels", "decode", "attention", "kv_dtype"),
            *("cache_size", "compression_ratio", "num_sink_tokens", "evict", "auto_recall", "recall_share"),
            *("on_full", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed"),
            *(name for name in setting_fields() if name.startswith("dry_")),
            "loop_guard",
            *("system_prompt", "chat_format", "template_args", "snapshot_turns", "metrics_port", "metrics_host"),
        ),
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: An argument or a file is invalid.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    from streamchat.replay.run import RunFolder
    from streamchat.telemetry.log_file import start_logging

    start_logging()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    configuration = flags.configuration_of(args)
    if args.resume_run:
        folder = RunFolder(paths.user_path(args.resume_run))
        configuration = _resume_arguments(args, folder, configuration)
    else:
        folder = RunFolder(_new_folder(args.out))
    _check_numbers(args)
    if args.chaos is not None and args.chaos_link is None:
        return _run_with_chaos(args, configuration, folder)
    if args.workers is None and args.ray is None:
        return _run_one(args, configuration, folder)
    return _run_on_workers(args, configuration, folder)


def _run_one(args: argparse.Namespace, configuration: Configuration, folder: RunFolder) -> int:
    """Run everything in this process, in one engine."""
    from streamchat.replay.runner import Plan

    repeat = None if args.repeat == "forever" else int(args.repeat)
    until = None if args.duration is None else parse_duration(args.duration, "--duration")
    script = _read(args)
    rows: list[dict[str, Any]] = []
    if args.resume_run:
        rows = folder.rows()
        folder.truncate_to(rows)
    else:
        _save_arguments(args, configuration, folder)
    plan = Plan(
        configuration,
        script,
        folder,
        rows,
        fresh=args.fresh,
        teacher_forced=args.teacher_forced,
        repeat=repeat,
        max_turns=args.max_turns,
        time_limit_s=until,
        drift=args.max_drift / 100,
    )
    if args.chaos_link is not None:
        from streamchat.commands.replay_chaos import run_measured

        return run_measured(args, plan)
    return _replay(plan, quiet=args.quiet, tui=args.tui)


def _run_with_chaos(args: argparse.Namespace, configuration: Configuration, folder: RunFolder) -> int:
    """Run in another process, and disturb it."""
    from streamchat.commands.replay_chaos import check_chaos_flags, supervise, with_metrics
    from streamchat.replay.runner import total_turns

    check_chaos_flags(args)
    script = _read(args)
    configuration = with_metrics(configuration, is_resumed=bool(args.resume_run))
    _save_arguments(args, configuration, folder)
    repeat = None if args.repeat == "forever" else int(args.repeat)
    total = total_turns(script, repeat, args.max_turns)
    finished = supervise(args, configuration, folder, total, script.problems)
    if finished.report is not None:
        _print(finished.report, *finished.files)
    return finished.exit_code


def _run_on_workers(args: argparse.Namespace, configuration: Configuration, folder: RunFolder) -> int:
    """Run every conversation from its start, on workers."""
    from streamchat.commands.replay_workers import read_workers_jobs, replay_on_workers

    _check_files(args)
    jobs = read_workers_jobs(args)
    _check_script(args, jobs.problems, jobs.turns)
    if not args.resume_run:
        _save_arguments(args, configuration, folder)
    finished = replay_on_workers(args, configuration, folder, jobs)
    if finished.report is not None:
        _print(finished.report, *finished.files)
    return finished.exit_code


def _save_arguments(args: argparse.Namespace, configuration: Configuration, folder: RunFolder) -> None:
    """Write run.json, for `--resume-run`."""
    about = {name: getattr(args, name) for name in SAVED_ARGUMENTS}
    about["files"] = [str(paths.user_path(file).resolve()) for file in args.files]
    about["settings"] = asdict(configuration.settings)
    about["given"] = sorted(configuration.origins)
    try:
        write_json(folder.about, about, durable=True, indent=1)
    except OSError as error:
        raise ConfigError(f"--out {folder.path} cannot be written ({reason_of(error)})") from error


def _replay(plan: Plan, *, quiet: bool, tui: bool) -> int:
    from streamchat.base.events import Notice
    from streamchat.commands.replay_view import View
    from streamchat.replay.runner import Runner

    view = View(sys.stderr, plan.total, quiet=quiet or tui, done=len(plan.rows))

    def on_violation(text: str) -> None:
        if tui:
            runner.run.engine.publish(Notice(text, "error"))
        else:
            view.print_message(text)

    runner = Runner(plan, view.turn, on_violation)
    view.print_skipped(plan.script.problems)
    if tui:
        _run_in_app(runner.run, plan.configuration)
    else:
        runner.run.engine.subscribe(view.loading)
        with view, _stopping(runner.run, view):
            runner.run.run()
    finished = runner.finish()
    if finished.report is not None:
        _print(finished.report, *finished.files)
    elif runner.run.failure is not None:
        view.print_message(runner.run.failure.message)
    return finished.exit_code


def _print(report: dict[str, Any], as_html: Path, as_json: Path) -> None:
    totals = report["totals"]
    lines = [
        f"{plural(totals['turns'], 'turn')}, {plural(totals['tokens'], 'token')}, "
        f"{plural(totals['compressions'], 'compression')}, {plural(totals['tokens_evicted'], 'token')} evicted; "
        f"{report['ended']}"
    ]
    width = max(len(check["name"]) for check in report["invariants"])
    for check in report["invariants"]:
        state = "holds" if check["holds"] else "VIOLATED"
        if not check["checked"]:
            state = "not checked"
        detail = check["first"] or check["last"]
        lines.append(f"  {check['name']:<{width}}  {state:<13}  {one_line(detail)}".rstrip())
    if "chaos" in report:
        from streamchat.replay.chaos.section import chaos_lines

        lines += [one_line(line) if not line.startswith(" ") else line for line in chaos_lines(report["chaos"])]
    lines += [f"report: {as_html}", f"        {as_json}"]
    sys.stdout.write(printable("\n".join(lines)) + "\n")


def _run_in_app(replay_run: Run, configuration: Configuration) -> None:
    """Run on a separate thread with the app in front. Quitting the app stops the run."""
    from streamchat.base.events import Notice

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("--tui needs a terminal; without it the run prints lines of text")

    def work() -> None:
        replay_run.run(started=True)
        replay_run.engine.publish(Notice("The run is finished; the report is written when you quit.", "info"))

    worker = threading.Thread(target=work, name="streamchat-replay", daemon=True)
    worker.start()
    from streamchat.tui.app import run_app  # deferred: only this form needs Textual

    run_app(replay_run.engine, configuration, watching=True)
    if worker.is_alive():
        replay_run.stop.set()
        worker.join(60.0)


@contextmanager
def _stopping(run: Run, view: Any) -> Iterator[None]:
    """Let Ctrl+C stop the run after the turn, a second one stop the reply, and a third one exit at once."""
    presses = 0

    def stop(*_: object) -> None:
        nonlocal presses
        presses += 1
        run.stop.set()
        if presses == 1:
            view.print_message("stopping after this turn; Ctrl+C again stops the reply")
        elif presses == 2:
            run.engine.send(Stop())
        else:
            raise KeyboardInterrupt

    with on_signals((signal.SIGINT, signal.SIGTERM), stop):
        yield


# --- arguments --------------------------------------------------------------------------------------------------


def _new_folder(given: str | None) -> Path:
    if given is None:
        name = time.strftime("%Y%m%d-%H%M%S")
        path = paths.state_dir() / "runs" / name
        number = 1
        while path.exists():
            number += 1
            path = path.with_name(f"{name}-{number}")
        return path
    path = paths.user_path(given)
    if os.path.exists(path) and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--out {given}: folder is not empty; choose a new one, or --resume-run {given}")
    return path


def _resume_arguments(args: argparse.Namespace, folder: RunFolder, configuration: Configuration) -> Configuration:
    """Load arguments and settings of the run in `folder`; a new duration or number of turns overrides the old one."""
    from dataclasses import replace

    from streamchat.config.loader import check_value
    from streamchat.config.settings import spec_of

    try:
        about = json.loads(folder.about.read_text(encoding="utf-8"))
        settings = about.pop("settings")
        known = {name: about.get(name) if name in NEWER else about[name] for name in SAVED_ARGUMENTS}
        given = set(about.get("given", settings))  # earlier versions did not store it
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise ConfigError(f"--resume-run {folder.path}: no resumable run found there") from None
    if args.files:
        raise ConfigError("--resume-run uses the files of that run; do not give a FILE")
    for name, value in known.items():
        if name not in REPLACED or getattr(args, name) is None:
            setattr(args, name, value)
    origin = str(folder.about)
    values = {
        name: check_value(name, settings[name], origin)
        for name in setting_fields()
        if name in settings and (name in given or not spec_of(name).by_model)  # else the model advises it again
    }
    return replace(
        configuration, settings=replace(configuration.settings, **values), origins=dict.fromkeys(values, origin)
    )


def _check_numbers(args: argparse.Namespace) -> None:
    if args.repeat != "forever" and not parse_whole_number(str(args.repeat)):
        raise ConfigError(f"--repeat {args.repeat} must be at least 1, or 'forever'")
    if args.duration is not None:
        parse_duration(args.duration, "--duration")
    if args.max_turns is not None and args.max_turns < (0 if args.resume_run else 1):
        raise ConfigError(f"--max-turns {args.max_turns} must be at least 1")
    if not args.max_drift > 0:
        raise ConfigError(f"--max-drift {args.max_drift:g} must be above 0")


def _read(args: argparse.Namespace) -> Script:
    _check_files(args)
    script = read_scripts([paths.user_path(file) for file in args.files], args.format)
    _check_script(args, script.problems, script.turns)
    return script


def _check_files(args: argparse.Namespace) -> None:
    if not args.files:
        raise ConfigError("no input: give at least one FILE")


def _check_script(args: argparse.Namespace, problems: list[str], turns: int) -> None:
    if args.strict and problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]}{more}; without --strict such lines are skipped")
    if not turns:
        first = f": {problems[0]}" if problems else ""
        raise ConfigError(f"{', '.join(args.files)}: contains no user messages{first}")
