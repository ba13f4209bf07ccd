"""What a recorded chat had promised at each moment, according to its marks in the log."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from tools.disk.journal import Mark, Recording
from tools.disk.scenario import SessionTruth, Truth


@dataclass(frozen=True)
class Promises:
    """What the disk must have at a moment."""

    step: str
    """The running step; '' between two steps."""
    latest: str
    """The latest step that has started."""
    before: Truth
    """What was true when the running step started."""
    after: Truth
    """What is true when the running step ends; equals `before` between two steps."""
    turns: dict[str, list[tuple[int, list[str]]]]
    """Session -> number, message, and reply of the turns that the running step has finished."""
    digests: dict[str, set[str]]
    """Session -> digests of the caches that were saved until then."""
    unsure: frozenset[str] = frozenset()
    """Sessions that the chat had reported as not saved; the disk may have any number of their first turns."""


def _truth(saved: dict[str, Any]) -> Truth:
    sessions = {name: SessionTruth(**each) for name, each in saved["sessions"].items()}
    return Truth(**(saved | {"sessions": sessions}))


@dataclass
class _Moment:
    step: str = ""
    latest: str = ""
    before: Truth = field(default_factory=Truth)
    after: Truth = field(default_factory=Truth)
    turns: dict[str, list[tuple[int, list[str]]]] = field(default_factory=dict)
    digests: dict[str, set[str]] = field(default_factory=dict)


class Story:
    """All promises of a recording."""

    def __init__(self, recording: Recording) -> None:
        marks = [(i, json.loads(each.text)) for i, each in enumerate(recording.changes, 1) if isinstance(each, Mark)]
        ends = [(i, _truth(mark["truth"])) for i, mark in marks if "end" in mark]
        self._starts, self._promises = [0], [Promises("", "", Truth(), Truth(), {}, {})]
        now = _Moment()
        for i, mark in marks:
            self._take(now, mark, next((truth for end, truth in ends if end > i), now.after))
            digests = {session: set(each) for session, each in now.digests.items()}
            turns = {session: list(each) for session, each in now.turns.items()}
            self._starts.append(i)
            self._promises.append(Promises(now.step, now.latest, now.before, now.after, turns, digests))

    @staticmethod
    def _take(now: _Moment, mark: dict[str, Any], next_truth: Truth) -> None:
        if "begin" in mark:
            now.step = now.latest = mark["begin"]
            now.after = next_truth
        elif "end" in mark:
            now.step, now.before, now.turns = "", _truth(mark["truth"]), {}
            now.after = now.before
        elif "turn" in mark:
            now.turns.setdefault(mark["turn"], []).append((mark["number"], mark["said"]))
        else:
            now.digests.setdefault(mark["snapshot"], set()).add(mark["digest"])

    def at(self, moment: int) -> Promises:
        """Return what had been promised after `moment` changes."""
        return self._promises[bisect_right(self._starts, moment) - 1]
