"""Wires a run of a script: engine, inspector, metrics, the files of the run and its report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from streamchat.base.errors import ExitCode
from streamchat.base.formatting import plural
from streamchat.config.loader import Configuration
from streamchat.replay.checked_run import CheckedRun, Reports
from streamchat.replay.report import make_report, write_report
from streamchat.replay.run import Run, RunFolder, Totals
from streamchat.replay.script import Script, steps


def total_turns(script: Script, repeat: int | None, max_turns: int | None) -> int | None:
    """Return the number of turns of a run; None if it has no end.

    Args:
        script: The script.
        repeat: Passes over it; None repeats forever.
        max_turns: Limit of the turns; None for none.
    """
    totals = [max_turns, None if repeat is None else script.turns * repeat]
    return min((total for total in totals if total is not None), default=None)


@dataclass(frozen=True)
class Plan:
    """What to run."""

    configuration: Configuration
    script: Script
    folder: RunFolder
    rows: list[dict[str, Any]]
    """Rows of turns.jsonl that an earlier process wrote."""
    fresh: bool = False
    """Start a new conversation for every record of the script."""
    teacher_forced: bool = False
    """Feed the replies of the script."""
    repeat: int | None = 1
    """Passes over the script; None repeats forever."""
    max_turns: int | None = None
    time_limit_s: float | None = None
    drift: float = 0.25
    """Allowed growth of times over the window, as a share."""

    @property
    def total(self) -> int | None:
        """Number of turns of the whole run; None if it has no end."""
        return total_turns(self.script, self.repeat, self.max_turns)


@dataclass(frozen=True)
class FinishedRun:
    """Exit code and report of a run."""

    exit_code: int
    report: dict[str, Any] | None = None
    """None if the run failed before its first turn."""
    files: tuple[Path, ...] = ()
    """The page and the JSON file of the report."""


class Runner:
    """One run. Drive it with `run.run()`, then call `finish`.

    Args:
        plan: What to run.
        on_turn: Called after each turn with its row.
        on_violation: Called with a sentence on the engine's thread when an invariant is violated.
    """

    def __init__(
        self, plan: Plan, on_turn: Callable[[dict[str, Any], Totals], None], on_violation: Callable[[str], None]
    ) -> None:
        self._plan = plan
        turns = steps(plan.script, fresh=plan.fresh, teacher_forced=plan.teacher_forced, repeat=plan.repeat)
        stop = None if plan.max_turns is None else min(plan.max_turns, sys.maxsize)
        self._checked = CheckedRun(
            plan.configuration,
            plan.folder,
            plan.rows,
            islice(turns, len(plan.rows), stop),
            Reports(on_turn, on_violation),
            drift=plan.drift,
            time_limit_s=plan.time_limit_s,
        )
        self.run, self.inspector = self._checked.run, self._checked.inspector

    def close(self) -> None:
        """Close the engine and judge the whole run, without a report."""
        self._checked.close()

    def finish(self) -> FinishedRun:
        """Close the engine, judge the whole run and write the report."""
        judged = self.judge()
        if judged.report is None:
            return judged
        files = write_report(self._plan.folder.path, judged.report, self._plan.folder.rows())
        return replace(judged, files=files[::-1])

    def judge(self) -> FinishedRun:
        """Close the engine and judge the whole run; do not write the report."""
        run, plan, inspector = self.run, self._plan, self.inspector
        self.close()
        rows = plan.folder.rows()  # not kept in memory during the run: a week has very many
        if run.failure is not None and not rows:
            return FinishedRun(run.failure.exit_code)
        report = make_report(
            about=json.loads(plan.folder.about.read_text(encoding="utf-8")),
            settings=asdict(plan.configuration.settings),
            model=asdict(run.info) if run.info is not None else {"name": "?", "dtype": "?", "device": "?"},
            totals=run.totals,
            invariants=inspector.invariants.values(),
            rows=rows,
            problems=plan.script.problems,
            ended=end_reason(run, plan.time_limit_s, plan.total),
        )
        code: int = ExitCode.INTERRUPTED if run.stop.is_set() else ExitCode.OK
        if not inspector.holds:
            code = ExitCode.CHECK_FAILED
        if run.failure is not None:
            code = run.failure.exit_code
        return FinishedRun(code, report)


def end_reason(run: Run, time_limit_s: float | None, total: int | None) -> str:
    """Return why a run of `total` turns ended, as text."""
    if run.failure is not None:
        return f"failed: {run.failure.message}"
    if run.stop.is_set():
        return "stopped by the user"
    if time_limit_s is not None and (total is None or run.totals.turns < total):
        return "time limit reached"
    refused = run.totals.failed
    return (
        f"all turns replayed; {plural(refused, 'turn was', 'turns were')} refused" if refused else "all turns replayed"
    )
