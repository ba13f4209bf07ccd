"""The token log of a conversation: every id ever fed, in order, and the turn it belongs to. Text is for display."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamchat.store.records import CacheMark

if TYPE_CHECKING:  # the log itself needs no torch
    from torch import Tensor


@dataclass
class Speed:
    """Speed of a turn, up to now."""

    ttft_s: float | None = None
    """From the start of the turn to the first token of the reply; None without one."""
    decode_tps: float | None = None
    """Tokens per second after the first one; None with fewer than two."""


@dataclass(frozen=True)
class TurnStart:
    """State before a turn, for undo."""

    cache: CacheMark
    generator: Tensor | None = None
    """State of the random generator."""
    speed: Speed = field(default_factory=Speed)
    """That of the turn before."""
    recalled: tuple[tuple[int, int], ...] = ()
    """Runs of log indices that were recalled for the turn before."""


@dataclass(slots=True)
class TurnRecord:
    """One turn and its position in the token log."""

    number: int
    """Turn number, from 1."""
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
    """None if the turn is too old to undo."""
    prompt_end: int | None = None
    """One past the log index of the last token fed before the reply. None if this process did not feed it."""
    given: bool = False
    """Whether the reply was given, not generated."""
    recalled: tuple[int, ...] = ()
    """Numbers of the evicted turns that were paged in for its message, or stayed for it."""


@dataclass
class TokenLog:
    """Ids in the order they were fed, 4 bytes each. Evictions do not change it; undoing a turn cuts its end."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    turns: list[TurnRecord] = field(default_factory=list)
    unchanged: int = 0
    """Number of ids, from the start, that did not change since an index of them set this to the length of the log."""

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        """Append ids that were fed."""
        self.ids.extend(ids)

    def ids_at(self, runs: Sequence[tuple[int, int]]) -> list[int]:
        """Return the ids at these runs of log indices."""
        return [token for first, stop in runs for token in self.ids[first:stop]]

    def turns_touching(self, first: int, stop: int) -> list[TurnRecord]:
        """Return the turns with tokens in `[first, stop)`, oldest first. Uses binary search."""
        start = max(0, bisect.bisect_right(self.turns, first, key=lambda turn: turn.start) - 1)
        found = []
        for turn in self.turns[start:]:
            if turn.start >= stop:
                break
            if turn.end is None or turn.end > first:
                found.append(turn)
        return found

    def first_turn_from(self, index: int) -> int:
        """Return the number of the first turn that starts at or after `index`; one past the last turn if none does."""
        return bisect.bisect_left(self.turns, index, key=lambda turn: turn.start) + 1

    def cut(self, index: int) -> None:
        """Remove all ids from log index `index` on."""
        del self.ids[index:]
        self.unchanged = min(self.unchanged, len(self.ids))

    def clear(self) -> None:
        """Remove all ids and turns."""
        self.ids = array("i")
        self.turns = []
        self.unchanged = 0
