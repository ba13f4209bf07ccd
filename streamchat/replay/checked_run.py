"""A run on an engine of its own, with its invariants checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from streamchat.base.sanitize import one_line
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import Load
from streamchat.engine.engine import Engine
from streamchat.replay.invariants import Inspector, Violation
from streamchat.replay.run import Run, RunFolder, Totals
from streamchat.replay.script import Step
from streamchat.store.store import Store
from streamchat.telemetry.metrics import observe

SAVE_STATE_EVERY = 25
"""Turns between two writes of the state of the invariants."""


@dataclass(frozen=True)
class Reports:
    """Whom a run tells about itself."""

    on_turn: Callable[[dict[str, Any], Totals], None]
    """Called after each turn with its row."""
    on_violation: Callable[[str], None]
    """Called with a sentence on the engine's thread when an invariant is violated."""


class CheckedRun:
    """Drive it with `run.run()`, then call `close`.

    Args:
        configuration: Settings of the engine.
        folder: Folder for the files.
        rows: Rows of turns.jsonl that an earlier process wrote; their conversation is resumed.
        steps: The turns after them.
        reports: Whom to tell.
        drift: Allowed growth of times over the window, as a share.
        time_limit_s: No turn starts later than this many seconds after the first turn; None = no limit.
        load: Loads the model; None for the engine's own way.
    """

    def __init__(
        self,
        configuration: Configuration,
        folder: RunFolder,
        rows: list[dict[str, Any]],
        steps: Iterator[Step],
        reports: Reports,
        *,
        drift: float,
        time_limit_s: float | None = None,
        load: Load | None = None,
    ) -> None:
        self._folder, self._reports = folder, reports
        session = rows[-1]["session"] if rows else ""
        given: dict[str, Any] = {} if load is None else {"load": load}
        engine = Engine(
            configuration, **given, open_store=lambda: Store(folder.store), session=session or None, audit=True
        )
        self.inspector = Inspector(drift, self._report_violation, configuration.settings.loop_guard)
        self.inspector.resume(folder.read_state(), len(rows))
        self.run = Run(engine, steps, folder, self.inspector, self._end_turn, time_limit_s)
        for row in rows:
            self.run.totals.add(row)
        self.run.session = session
        if session:
            self.run.elapsed_before_s = rows[-1].get("elapsed_s", 0.0)
            self.run.resumed_at = rows[-1]["turn"] if rows[-1]["failed"] is None else rows[-1]["turn"] - 1
        self._metrics = observe(engine.subscribe, configuration.settings)

    def _report_violation(self, violation: Violation) -> None:
        path = self.run.dump(violation)
        where = f"; see {path}" if path else ""
        if self._metrics is not None:
            self._metrics.violations.labels(violation.name).inc()
        text = f"violated: {violation.name} at turn {violation.turn}: {one_line(violation.detail)}{where}"
        self._reports.on_violation(text)

    def _end_turn(self, row: dict[str, Any]) -> None:
        self._reports.on_turn(row, self.run.totals)
        if self.run.totals.turns % SAVE_STATE_EVERY == 0 or not self.inspector.holds:
            self._folder.save_state(self.inspector.state())

    def close(self) -> None:
        """Close the engine, judge the whole run, and save the verdicts."""
        self.run.engine.close(60.0)
        if self._metrics is not None:
            self._metrics.close()
        self.inspector.check_trends()
        self._folder.save_state(self.inspector.state())
