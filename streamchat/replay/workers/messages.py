"""The messages of a worker about a conversation: turns and violations, then how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamchat.base.events import ModelInfo


@dataclass(frozen=True)
class TurnDone:
    """A turn that has finished."""

    row: dict[str, Any]
    """Its line of turns.jsonl."""
    is_known: bool = False
    """Whether it was replayed before this job, for example by a lost worker."""


@dataclass(frozen=True)
class Violated:
    """An invariant that does not hold."""

    sentence: str


@dataclass(frozen=True)
class JobDone:
    """A conversation that has ended: all turns were replayed, or it was stopped, or it failed."""

    invariants: dict[str, dict[str, Any]]
    """State of the invariants by name; see `Inspector.state`."""
    info: ModelInfo | None
    failure: str = ""
    """Why the engine failed, as a sentence; '' if it did not."""
    exit_code: int = 0
    """The exit code of the failure."""


Message = TurnDone | Violated | JobDone


class WorkerLost(Exception):
    """The process of a worker has ended before its conversation."""
