"""The record of a conversation: every id ever fed, in order, and which turn it belongs to. Text is for display."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamchat.store.records import CacheMark

if TYPE_CHECKING:  # the log itself needs no torch
    from torch import Tensor


@dataclass(frozen=True)
class TurnStart:
    """How things stood before a turn, for taking it back."""

    cache: CacheMark
    generator: Tensor | None = None
    """State of the random generator."""
    ttft_s: float | None = None
    decode_tps: float | None = None


@dataclass
class TurnRecord:
    """One turn's place in the token log."""

    number: int
    """Counts from 1."""
    start: int
    """Log index of its first token."""
    message_start: int
    """Log index of the first token of the message itself, after its opening."""
    reply_start: int | None = None
    """Log index of the first token of the reply, including its opening if the format has one. None until known."""
    end: int | None = None
    """One past the log index of its last token; None while the turn runs."""
    text: str = ""
    reply: str = ""
    before: TurnStart | None = None
    """None where it is too long ago to be taken back."""
    prompt_end: int | None = None
    """Log index behind the last token that was fed before the reply. None if it was not fed by this process."""
    given: bool = False
    """The reply was given, not generated."""


@dataclass
class TokenLog:
    """Ids in the order they were fed, 4 bytes each. Evictions do not change it; taking back a turn cuts its end."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    turns: list[TurnRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        """Record ids that were fed."""
        self.ids.extend(ids)

    def ids_at(self, runs: Sequence[tuple[int, int]]) -> list[int]:
        """The ids at these runs of log indices."""
        return [token for first, stop in runs for token in self.ids[first:stop]]

    def turns_touching(self, first: int, stop: int) -> list[TurnRecord]:
        """Turns with tokens in `[first, stop)`, oldest first. Looks at few: turns are in order."""
        start = max(0, bisect.bisect_right(self.turns, first, key=lambda turn: turn.start) - 1)
        found = []
        for turn in self.turns[start:]:
            if turn.start >= stop:
                break
            if turn.end is None or turn.end > first:
                found.append(turn)
        return found

    def first_turn_from(self, index: int) -> int:
        """Number of the oldest turn that begins at log index `index` or later; one past the last turn without one."""
        return bisect.bisect_left(self.turns, index, key=lambda turn: turn.start) + 1

    def cut(self, index: int) -> None:
        """Take back all ids from log index `index` on."""
        del self.ids[index:]

    def clear(self) -> None:
        """Start over."""
        self.ids = array("i")
        self.turns = []
