"""`streamchat replay --workers N` and `--ray ADDRESS`: every conversation from its start, on workers."""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from streamchat.base import paths
from streamchat.base.atomic_files import write_text
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import plural
from streamchat.base.paths import private_opener
from streamchat.base.processors import usable_processors
from streamchat.base.ray_cluster import ClusterLostError
from streamchat.base.signals import on_signals
from streamchat.commands.replay_view import View
from streamchat.config.loader import Configuration
from streamchat.replay.durations import parse_duration
from streamchat.replay.run import RunFolder, Totals
from streamchat.replay.runner import FinishedRun
from streamchat.replay.workers.jobs import FOLDERS, Jobs, read_jobs

if TYPE_CHECKING:
    from streamchat.replay.workers.fleet import Fleet, Outcome


def read_workers_jobs(args: argparse.Namespace) -> Jobs:
    """Return the conversations that the arguments ask for.

    Raises:
        ConfigError: An argument or a file is invalid, or cannot be used with workers.
    """
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers} must be at least 1")
    for flag, given in (("--tui", args.tui), ("--repeat forever", args.repeat == "forever")):
        if given:
            raise ConfigError(
                f"{flag} cannot be used with --workers or --ray; replay without workers or without {flag}"
            )
    return read_jobs(
        [paths.user_path(file) for file in args.files],
        args.format,
        fresh=args.fresh,
        teacher_forced=args.teacher_forced,
        repeat=int(args.repeat),
        max_turns=args.max_turns,
    )


def replay_on_workers(
    args: argparse.Namespace, configuration: Configuration, folder: RunFolder, jobs: Jobs
) -> FinishedRun:
    """Replay all conversations on workers and write one report.

    Raises:
        ConfigError: The metrics port was set, or the cluster cannot be reached.
    """
    from streamchat.replay.workers.fleet import Fleet
    from streamchat.replay.workers.local import LocalWorker, wait_for_local
    from streamchat.replay.workers.ray_actors import RayWorker, cluster, wait_for_actors

    if configuration.settings.metrics_port:
        raise ConfigError(
            f"metrics_port = {configuration.settings.metrics_port} ({configuration.origin('metrics_port')}) cannot "
            "be used with --workers or --ray: a run on workers serves no metrics"
        )
    view = View(sys.stderr, jobs.turns, quiet=args.quiet)
    view.print_skipped(jobs.problems)
    with ExitStack() as stack:
        if args.ray is None:
            count = args.workers or max(1, usable_processors() // 2)
        else:
            head, count = stack.enter_context(cluster(args.ray, args.workers))
        plan = _plan(args, configuration, folder)
        record = stack.enter_context(closing(_Record(view, folder)))
        fleet: Fleet[Any]
        if args.ray is None:
            fleet = Fleet(jobs.jobs, lambda: LocalWorker(plan), wait_for_local, record.add, view.print_message)
        else:
            fleet = Fleet(
                jobs.jobs,
                lambda: RayWorker(plan, head),
                partial(wait_for_actors, head),
                record.add,
                view.print_message,
            )
        _drive(fleet, view, args, count, folder)
    return _finish(fleet, args, configuration, folder, jobs, view)


class _Record:
    """Counts and shows the turns, and appends them to turns.jsonl as they come.

    Args:
        view: Shows them.
        folder: Folder of the run.
    """

    def __init__(self, view: View, folder: RunFolder) -> None:
        self._view = view
        self._totals = Totals()
        self._of: dict[int, Totals] = {}
        self._file = open(folder.turns, "w", encoding="utf-8", opener=private_opener)  # noqa: SIM115 - closed below

    def add(self, row: dict[str, Any], is_known: bool) -> None:
        """Add a turn; one that an earlier run has replayed is not shown."""
        counts = self._of.setdefault(row["conversation"], Totals())
        before = replace(counts)
        counts.add({**row, "conversation": 1})
        for each in fields(Totals):
            change = getattr(counts, each.name) - getattr(before, each.name)
            setattr(self._totals, each.name, getattr(self._totals, each.name) + change)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._view.turn(row, self._totals, is_known=is_known)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plan(args: argparse.Namespace, configuration: Configuration, folder: RunFolder) -> Any:
    from streamchat.replay.workers.conversation import MARK, WorkerPlan, with_absolute_paths

    mark = secrets.token_hex(16)
    write_text(folder.path / MARK, mark, durable=False)
    configuration = with_absolute_paths(configuration)
    return WorkerPlan(configuration, folder.path.absolute(), mark, args.max_drift / 100)


def _drive(fleet: Fleet[Any], view: View, args: argparse.Namespace, count: int, folder: RunFolder) -> None:
    limit = None if args.duration is None else parse_duration(args.duration, "--duration")
    view.start()
    with view, _stopping(fleet, view):
        try:
            fleet.run(count, limit)
        except ClusterLostError as error:
            raise ClusterLostError(
                f"{error}; the finished turns are saved, and `streamchat replay --resume-run {folder.path}` continues "
                "the run"
            ) from None


@contextmanager
def _stopping(fleet: Fleet[Any], view: View) -> Iterator[None]:
    """Let Ctrl+C stop the run after the running turns, and a second one end the workers at once."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = fleet.interrupted = True
        fleet.stop.set()
        view.print_message("stopping after the running turns; Ctrl+C again ends the workers at once")

    with on_signals((signal.SIGINT, signal.SIGTERM), stop), suppress(KeyboardInterrupt):
        yield


def _finish(
    fleet: Fleet[Any],
    args: argparse.Namespace,
    configuration: Configuration,
    folder: RunFolder,
    jobs: Jobs,
    view: View,
) -> FinishedRun:
    from streamchat.replay.report import write_report
    from streamchat.replay.workers.merge import report_of, rows_of, save_finished

    if fleet.failure is not None and not rows_of(fleet.outcomes):
        view.print_message(fleet.failure.failure)
        return FinishedRun(fleet.failure.exit_code)
    for outcome in fleet.outcomes:
        save_finished(outcome, RunFolder(folder.path / FOLDERS / outcome.job.folder))
    rows = rows_of(fleet.outcomes)
    folder.truncate_to(rows)
    report = report_of(
        fleet.outcomes,
        folder,
        configuration.settings,
        drift=args.max_drift / 100,
        problems=jobs.problems,
        ended=_end_reason(fleet, len(rows), jobs.turns),
    )
    as_json, as_html = write_report(folder.path, report, rows)
    return FinishedRun(_exit_code(fleet, report), report, (as_html, as_json))


def _end_reason(fleet: Fleet[Any], turns: int, total: int) -> str:
    failed = _failed(fleet)
    if failed:
        return f"failed: {plural(len(failed), 'conversation')} did not finish"
    if fleet.interrupted:
        return "stopped by the user"
    if turns < total:
        return "time limit reached"
    refused = sum(row["failed"] is not None for outcome in fleet.outcomes for row in outcome.rows)
    told = f"; {plural(refused, 'turn was', 'turns were')} refused" if refused else ""
    return f"all turns replayed{told}"


def _failed(fleet: Fleet[Any]) -> list[Outcome]:
    return [outcome for outcome in fleet.outcomes if outcome.done is not None and outcome.done.failure]


def _exit_code(fleet: Fleet[Any], report: dict[str, Any]) -> int:
    if failed := _failed(fleet):
        return failed[0].done.exit_code if failed[0].done is not None else ExitCode.FAILURE
    if report["verdict"] != "all hold":
        return ExitCode.CHECK_FAILED
    return ExitCode.INTERRUPTED if fleet.interrupted else ExitCode.OK
