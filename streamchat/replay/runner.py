"""Wires a run of a script: engine, inspector, metrics, the files of the run and its report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from streamchat.base.errors import ExitCode
from streamchat.base.formatting import plural
from streamchat.base.sanitize import one_line
from streamchat.config.loader import Configuration
from streamchat.engine.engine import Engine
from streamchat.replay.invariants import Inspector, Violation
from streamchat.replay.report import make_report, write_report
from streamchat.replay.run import Run, RunFolder, Totals
from streamchat.replay.script import Script, steps
from streamchat.store.store import Store
from streamchat.telemetry.metrics import observe

SAVE_STATE_EVERY = 25
"""Turns between two writes of the state of the invariants."""


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
        totals = [self.max_turns, None if self.repeat is None else self.script.turns * self.repeat]
        return min((total for total in totals if total is not None), default=None)


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
        self._plan, self._on_turn, self._on_violation = plan, on_turn, on_violation
        rows, folder = plan.rows, plan.folder
        session = rows[-1]["session"] if rows else ""
        engine = Engine(plan.configuration, open_store=lambda: Store(folder.store), session=session or None, audit=True)
        self._inspector = Inspector(plan.drift, self._report_violation, plan.configuration.settings.loop_guard)
        self._inspector.resume(folder.read_state(), len(rows))
        turns = steps(plan.script, fresh=plan.fresh, teacher_forced=plan.teacher_forced, repeat=plan.repeat)
        stop = None if plan.max_turns is None else min(plan.max_turns, sys.maxsize)
        self.run = Run(
            engine, islice(turns, len(rows), stop), folder, self._inspector, self._end_turn, plan.time_limit_s
        )
        for row in rows:
            self.run.totals.add(row)
        self.run.session = session
        if session:
            self.run.resumed_at = rows[-1]["turn"] if rows[-1]["failed"] is None else rows[-1]["turn"] - 1
        self._metrics = observe(engine.subscribe, plan.configuration.settings)

    def _report_violation(self, violation: Violation) -> None:
        path = self.run.dump(violation)
        where = f"; see {path}" if path else ""
        if self._metrics is not None:
            self._metrics.violations.labels(violation.name).inc()
        self._on_violation(f"violated: {violation.name} at turn {violation.turn}: {one_line(violation.detail)}{where}")

    def _end_turn(self, row: dict[str, Any]) -> None:
        self._on_turn(row, self.run.totals)
        if self.run.totals.turns % SAVE_STATE_EVERY == 0 or not self._inspector.holds:
            self._plan.folder.save_state(self._inspector.state())

    def finish(self) -> FinishedRun:
        """Close the engine, judge the whole run and write the report."""
        run, plan, inspector = self.run, self._plan, self._inspector
        run.engine.close(60.0)
        if self._metrics is not None:
            self._metrics.close()
        rows = plan.folder.rows()  # not kept in memory during the run: a week has very many
        if run.failure is not None and not rows:
            return FinishedRun(run.failure.exit_code)
        inspector.check_trends()
        plan.folder.save_state(inspector.state())
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
        as_json, as_html = write_report(plan.folder.path, report, rows)
        code: int = ExitCode.INTERRUPTED if run.stop.is_set() else ExitCode.OK
        if not inspector.holds:
            code = ExitCode.CHECK_FAILED
        if run.failure is not None:
            code = run.failure.exit_code
        return FinishedRun(code, report, (as_html, as_json))


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
