"""`streamchat replay --chaos SEED`: the supervisor of the run, and the run itself in a process of its own."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamchat.base import child_processes
from streamchat.base.errors import ConfigError, ExitCode, reason_of
from streamchat.base.host_names import resolve
from streamchat.base.sanitize import one_line
from streamchat.base.signals import on_signals
from streamchat.commands.replay_view import View
from streamchat.config.loader import Configuration
from streamchat.replay.chaos.kinds import KINDS
from streamchat.replay.run import RunFolder, Totals

if TYPE_CHECKING:
    from streamchat.replay.chaos.link import Link
    from streamchat.replay.chaos.supervisor import Command, Supervisor
    from streamchat.replay.runner import FinishedRun, Plan, Runner

COMMAND: Command = child_processes.streamchat
"""Returns the command line of the measured process."""


def check_chaos_flags(args: argparse.Namespace) -> None:
    """Check the flags that do not go together.

    Raises:
        ConfigError: Some do not, or the system is not POSIX.
    """
    for flag, given in (("--tui", args.tui), ("--workers", args.workers), ("--ray", args.ray)):
        if given:
            raise ConfigError(f"{flag} cannot be used with --chaos; replay without {flag}")
    if not hasattr(signal, "SIGSTOP"):
        raise ConfigError("--chaos needs Linux or macOS; on Windows, use it in WSL")


def with_metrics(configuration: Configuration, *, is_resumed: bool) -> Configuration:
    """Return the configuration with a port for metrics, which clients of the run read."""
    if configuration.settings.metrics_port and not is_resumed:
        return configuration
    host = configuration.settings.metrics_host
    try:
        family, address = resolve(host, 0)
        with socket.socket(family) as probe:
            probe.bind(address)
            port = probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(
            f"--metrics-host {host!r} cannot be used ({reason_of(error)}); give an address of this machine"
        ) from error
    return replace(configuration, settings=replace(configuration.settings, metrics_port=port))


# --- the supervisor ---------------------------------------------------------------------------------------------


def supervise(
    args: argparse.Namespace, configuration: Configuration, folder: RunFolder, total: int | None, problems: list[str]
) -> FinishedRun:
    """Replay in another process, disturb it, check that nothing was lost, and complete the report.

    Args:
        args: Arguments of the command; `run.json` has them, too.
        configuration: Configuration of the run.
        folder: Folder of the run.
        total: Number of turns of the whole run; None if it has no end.
        problems: Script lines that cannot be used.
    """
    from streamchat.replay.chaos.supervisor import Supervisor
    from streamchat.replay.runner import FinishedRun

    rows = folder.rows()
    totals, failures, reports = Totals(), list[str](), list[dict[str, Any]]()
    for row in rows:
        totals.add(row)
    view = View(sys.stderr, total, quiet=args.quiet, done=len(rows))
    view.print_skipped(problems)
    kinds = [kind for kind in KINDS if not kind.missing()]
    has_app = any(kind.name == "resize" for kind in kinds)
    for kind in KINDS:
        if reason := kind.missing():
            view.print_message(f"chaos without {kind.name}: {reason}")

    def hear(name: str, value: Any) -> None:
        if name == "model":
            view.start()
        elif name == "row":
            totals.add(value)
            view.turn(value, totals)
        elif name in ("notice", "violation"):
            view.print_message(value)
        elif name == "failed":
            failures.append(value)
        elif name == "report":
            reports.append(value)

    port = configuration.settings.metrics_port
    arguments = ["replay", "--resume-run", str(folder.path.absolute())]
    with (
        view,
        Supervisor(arguments, folder, kinds, port, has_app=has_app, hear=hear, command=COMMAND) as process,
        _stopping(process, view),
    ):
        code = process.run()
    if not reports:
        why = failures[0] if failures else f"the run ended with code {code}: {one_line(process.last_line)}"
        view.print_message(why)
        return FinishedRun(code if code > 0 else ExitCode.FAILURE)
    return _complete(args.chaos, folder, reports[0], code)


def _complete(seed: int, folder: RunFolder, report: dict[str, Any], code: int) -> FinishedRun:
    """Open the session in a new process, compare it, and write the report with the results."""
    from streamchat.replay.chaos.check import check_kept
    from streamchat.replay.chaos.log import read_log
    from streamchat.replay.chaos.section import chaos_section
    from streamchat.replay.chaos.slopes import slopes
    from streamchat.replay.chaos.supervisor import Supervisor, log_path
    from streamchat.replay.report import write_report
    from streamchat.replay.runner import FinishedRun

    rows = folder.rows()
    arguments = ["replay", "--resume-run", str(folder.path.absolute()), "--max-turns", str(len(rows)), "--chaos-check"]
    with Supervisor(arguments, folder, (), 0, has_app=False, hear=lambda *_: None, command=COMMAND) as process:
        process.run()
    log = read_log(log_path(folder))
    kept = check_kept(log, folder.store)
    report["chaos"] = chaos_section(seed, KINDS, log, slopes(log, rows), kept)
    if not kept.holds:
        report["verdict"] = "violated"
        code = ExitCode.CHECK_FAILED
    as_json, as_html = write_report(folder.path, report, rows)
    return FinishedRun(code, report, (as_html, as_json))


@contextmanager
def _stopping(process: Supervisor, view: View) -> Iterator[None]:
    """Let Ctrl+C end the run in order, and a second one end it at once."""
    is_stopping = False

    def stop(*_: object) -> None:
        nonlocal is_stopping
        if is_stopping:
            raise KeyboardInterrupt
        is_stopping = True
        view.print_message("stopping; Ctrl+C again ends the run at once")
        process.stop()

    with on_signals((signal.SIGINT, signal.SIGTERM), stop):
        yield


# --- the measured process ---------------------------------------------------------------------------------------


def run_measured(args: argparse.Namespace, plan: Plan) -> int:
    """Run the plan, report to the supervisor, and return the exit code. Nothing is printed."""
    from streamchat.base import events as ev
    from streamchat.replay.chaos.injector import Injector
    from streamchat.replay.chaos.link import Link
    from streamchat.replay.runner import Runner

    link = Link(args.chaos_link)
    runner = Runner(plan, lambda row, _: link.send("row", row), lambda text: link.send("violation", text))
    kinds = [kind for kind in KINDS if not kind.missing()]
    seed = None if args.chaos_check else args.chaos
    injector = Injector(seed, kinds, link, runner.run.session, len(plan.rows))
    runner.inspector.is_disturbed = injector.is_disturbed

    def report_model(event: ev.Event) -> None:
        if isinstance(event, ev.ModelReady):
            link.send("model", event.info.name)

    runner.run.engine.subscribe(report_model)
    runner.run.engine.subscribe(injector.observe)
    runner.run.at_end = injector.close  # so that there is room for what closing saves
    has_app = not args.chaos_check and sys.stdin.isatty() and sys.stdout.isatty()
    if has_app:
        _run_in_app(runner, plan.configuration, link)
    else:
        _run_plain(runner)
    if args.chaos_check:
        runner.close()
        return ExitCode.OK
    judged = runner.judge()
    if judged.report is not None:
        link.send("report", judged.report)
    elif runner.run.failure is not None:
        link.send("failed", one_line(runner.run.failure.message))
    return judged.exit_code


def _run_plain(runner: Runner) -> None:
    with on_signals((signal.SIGTERM,), lambda _: runner.run.stop.set()):
        runner.run.run()


def _run_in_app(runner: Runner, configuration: Configuration, link: Link) -> None:
    """Run on a separate thread with the app in front, which ends with SIGTERM."""
    done = threading.Event()

    def work() -> None:
        runner.run.run(started=True)
        done.set()
        link.send("finished", runner.run.totals.turns)

    worker = threading.Thread(target=work, name="streamchat-replay", daemon=True)
    worker.start()
    from streamchat.tui.app import run_app  # deferred: only this form needs Textual

    run_app(runner.run.engine, configuration, watching=True)
    if not done.is_set():
        runner.run.stop.set()
    worker.join(60.0)
