"""Merges the results of workers into one report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from streamchat.base.atomic_files import write_json
from streamchat.base.events import ModelInfo
from streamchat.config.settings import Settings
from streamchat.replay.invariants import Invariant, all_invariants
from streamchat.replay.report import make_report
from streamchat.replay.run import RunFolder, Totals
from streamchat.replay.workers.fleet import Outcome


def rows_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the turns of all conversations, in the order of the script."""
    return [row for outcome in outcomes for row in outcome.rows]


def totals_of(outcomes: Sequence[Outcome]) -> Totals:
    """Return the totals over all conversations."""
    totals = Totals()
    for outcome in outcomes:
        counts = Totals()
        for row in outcome.rows:
            counts.add({**row, "conversation": 1})
        for each in fields(Totals):
            setattr(totals, each.name, getattr(totals, each.name) + getattr(counts, each.name))
    return totals


def invariants_of(outcomes: Sequence[Outcome], drift: float) -> list[Invariant]:
    """Return the verdicts over all conversations, with the details of the first violation and the latest figures.

    Args:
        outcomes: The conversations.
        drift: Maximum growth of times over the window, as a fraction.
    """
    merged = all_invariants(drift)
    for outcome in outcomes:
        for name, state in ({} if outcome.done is None else outcome.done.invariants).items():
            invariant, where = merged[name], f"conversation {outcome.job.number}: "
            for count in ("checked", "violations", "counted"):
                setattr(invariant, count, getattr(invariant, count) + state[count])
            if state["first"] and not invariant.first:
                invariant.first = where + state["first"]
            if state["last"]:
                invariant.last = where + state["last"]
    return list(merged.values())


def report_of(
    outcomes: Sequence[Outcome],
    folder: RunFolder,
    settings: Settings,
    *,
    drift: float,
    problems: list[str],
    ended: str,
) -> dict[str, Any]:
    """Return the object of `report.json`; see `make_report`."""
    infos = [outcome.done.info for outcome in outcomes if outcome.done is not None and outcome.done.info is not None]
    return make_report(
        about=json.loads(folder.about.read_text(encoding="utf-8")),
        settings=asdict(settings),
        model=_model(infos),
        totals=totals_of(outcomes),
        invariants=invariants_of(outcomes, drift),
        rows=rows_of(outcomes),
        problems=problems,
        ended=ended,
    )


def _model(infos: Sequence[ModelInfo]) -> dict[str, Any]:
    return asdict(infos[0]) if infos else {"name": "?", "dtype": "?", "device": "?"}


def save_finished(outcome: Outcome, folder: RunFolder) -> None:
    """Write the files of a conversation that ran on a machine that does not see the folder of the run."""
    if folder.turns.exists() or outcome.done is None:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.invariants, outcome.done.invariants, durable=False)
    folder.truncate_to(outcome.rows)
