"""Reads what a run with chaos recorded."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ChaosLog:
    """Everything that the processes of a run reported."""

    disturbances: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    turns: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """(session, turn) -> the finished turn, as it was reported last; not those that were undone."""
    notices: Counter[str] = field(default_factory=Counter)
    reopened: dict[str, Any] | None = None
    """The session as the latest process opened it."""

    @property
    def disturbed(self) -> set[int]:
        """Indices of the turns that a disturbance may have slowed down."""
        return {turn["index"] for turn in self.turns.values() if turn["disturbed"]}

    @property
    def last(self) -> dict[str, Any] | None:
        """The turn that finished last."""
        return max(self.turns.values(), key=lambda turn: int(turn["index"]), default=None)


def read_log(path: Path) -> ChaosLog:
    """Return the recorded messages. A turn of a session that was not saved yet belongs to the next one that opens."""
    log, unnamed = ChaosLog(), list[dict[str, Any]]()
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                [(name, value)] = json.loads(line).items()
            except ValueError:
                continue  # the supervisor was killed while it wrote
            match name:
                case "disturbance":
                    log.disturbances.append(value)
                case "sample":
                    log.samples.append(value)
                case "turn" if not value["session"]:
                    unnamed.append(value)
                case "turn":
                    log.turns[value["session"], value["turn"]] = value
                case "session":
                    log.turns |= {(value, turn["turn"]): turn | {"session": value} for turn in unnamed}
                    unnamed.clear()
                case "undone":
                    log.turns.pop((value["session"], value["turn"]), None)
                case "notice":
                    log.notices[value] += 1
                case "reopened":
                    log.reopened = value
                case _:
                    pass
    log.turns |= {("", turn["turn"]): turn for turn in unnamed}
    return log
