"""Finished turns as plain data, from which widgets are rebuilt when the user scrolls back."""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FinishedTurn:
    """One finished turn."""

    number: int
    text: str
    reply: str
    figures: str
    """The line under the reply."""
    cut: bool
    """The reply was cut off: stopped, or at the token limit."""
    evictions: tuple[tuple[str, bool], ...] = ()
    """(sentence, whether the eviction happened after the reply started) pairs. The event itself has the whole cache."""
    recalls: tuple[str, ...] = ()
    """Sentences about turns that were recalled for it."""


class TranscriptHistory:
    """All finished turns, in ascending order of number."""

    def __init__(self) -> None:
        self._turns: list[FinishedTurn] = []

    def __len__(self) -> int:
        return len(self._turns)

    def add(self, turn: FinishedTurn) -> None:
        """Append a finished turn."""
        self._turns.append(turn)

    def before(self, number: int, count: int) -> list[FinishedTurn]:
        """Up to `count` turns before turn `number`, in ascending order."""
        at = self.count_before(number)
        return self._turns[max(0, at - count) : at]

    def after(self, number: int, count: int) -> list[FinishedTurn]:
        """Up to `count` turns after turn `number`, in ascending order."""
        at = self.count_before(number + 1)
        return self._turns[at : at + count]

    def count_before(self, number: int) -> int:
        """Number of turns before turn `number`."""
        return bisect.bisect_left(self._turns, number, key=lambda turn: turn.number)

    def remove(self, number: int) -> None:
        """Remove turn `number` if it is the newest."""
        if self._turns and self._turns[-1].number == number:
            self._turns.pop()

    def clear(self) -> None:
        """Remove all turns."""
        self._turns = []
