"""Turns that are over, as plain data: what a widget is made of again when the reader scrolls back to it."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from streamchat.base.events import TokensEvicted


@dataclass(frozen=True)
class PastTurn:
    """One finished turn."""

    number: int
    text: str
    reply: str
    figures: str
    """The line under the reply."""
    cut: bool
    """The reply did not end by itself."""
    evictions: tuple[tuple[TokensEvicted, bool], ...] = ()
    """What left the cache meanwhile, and whether that was after the reply had begun."""


class Past:
    """All finished turns by number, ascending."""

    def __init__(self) -> None:
        self._turns: list[PastTurn] = []

    def __len__(self) -> int:
        return len(self._turns)

    def add(self, turn: PastTurn) -> None:
        """A turn is over."""
        self._turns.append(turn)

    def before(self, number: int, count: int) -> list[PastTurn]:
        """The `count` turns before turn `number`, ascending."""
        at = self._place(number)
        return self._turns[max(0, at - count) : at]

    def after(self, number: int, count: int) -> list[PastTurn]:
        """The `count` turns after turn `number`, ascending."""
        at = self._place(number + 1)
        return self._turns[at : at + count]

    def count_before(self, number: int) -> int:
        """How many there are before turn `number`."""
        return self._place(number)

    def remove(self, number: int) -> None:
        """Turn `number`, the newest, was taken back."""
        if self._turns and self._turns[-1].number == number:
            self._turns.pop()

    def clear(self) -> None:
        """Forget all."""
        self._turns = []

    def _place(self, number: int) -> int:
        return bisect.bisect_left(self._turns, number, key=lambda turn: turn.number)
