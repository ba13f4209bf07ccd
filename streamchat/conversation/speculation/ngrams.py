"""Finds where the newest tokens of a text occurred before, and what followed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from streamchat.conversation.log import TokenLog

LENGTHS = (8, 4, 2)
"""Lengths of the indexed n-grams, longest first: a longer one has fewer continuations."""
LONGEST = 32
"""Matched tokens are counted up to this number."""
FEWEST_SLOTS, MOST_SLOTS = 1 << 14, 1 << 18
"""Slots per table of positions, 4 bytes each. A table has two slots per token of the text, up to `MOST_SLOTS`: 3 MB for
all tables. In a longer text, later n-grams replace most of those from more than `MOST_SLOTS` tokens ago."""
BULK = 32
"""From this number of new tokens on, NumPy hashes them."""
_FACTOR, _MIXER, _MASK = 0x9E3779B1, 0x85EBCA6B, 0xFFFFFFFF


@dataclass(frozen=True)
class Match:
    """An earlier occurrence of the newest tokens."""

    next: int
    """Index of the token that follows it."""
    length: int
    """Number of matching tokens, at most `LONGEST`."""


class NgramIndex:
    """Positions of the latest occurrence of each n-gram, in hash tables without collision lists.

    Takes constant time per token, and at most `MOST_SLOTS` slots per length. A position is only a hint: `find` compares
    the tokens themselves.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._count = 0
        self._resize(FEWEST_SLOTS)

    def _resize(self, slots: int) -> None:
        self._slots, self._shift = slots, 32 - (slots.bit_length() - 1)
        self._tables = {length: array("i", [-1]) * slots for length in LENGTHS}

    def update(self, log: TokenLog) -> None:
        """Index the tokens of `log` that are new since the last call; sets `log.unchanged`."""
        count = len(log)
        start = min(self._count, log.unchanged)
        if 2 * count > self._slots and self._slots < MOST_SLOTS:
            self._resize(min(MOST_SLOTS, 1 << (4 * count - 1).bit_length()))
            start = 0
        if count - start >= BULK:
            self._add_many(log.ids, start)
        else:
            for position in range(start, count):
                for length, slot in self._hashes(log.ids[max(0, position - LENGTHS[0]) : position][::-1]):
                    self._tables[length][slot] = position
        self._count = log.unchanged = count

    def find(self, log: TokenLog, token: int) -> Match | None:
        """Return the longest known match of the newest tokens (the end of `log`, then `token`), the latest one."""
        ids = log.ids
        newest = array("i", [token]) + ids[:-LONGEST:-1]
        for length, slot in reversed(list(self._hashes(newest[: LENGTHS[0]]))):
            position = self._tables[length][slot]
            if position < length or position >= len(ids):
                continue
            matched = _common(newest, ids[max(0, position - LONGEST) : position][::-1])
            if matched >= length:
                return Match(position, matched)
        return None

    def _hashes(self, newest: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield each indexed length and its slot, for the tokens before a position, the newest first."""
        tables, shift, value = self._tables, self._shift, 0
        for count, token in enumerate(newest, 1):
            value = (value * _FACTOR + token + 1) & _MASK
            if count in tables:
                yield count, ((value * _MIXER) & _MASK) >> shift

    def _add_many(self, ids: array[int], start: int) -> None:
        first = max(0, start - LENGTHS[0])
        text = np.frombuffer(ids[first:], dtype=np.uint32)
        for length in LENGTHS:
            positions = np.arange(max(start, length), len(ids))
            value = np.zeros(len(positions), dtype=np.uint32)  # wraps around, as `_MASK` does
            for distance in range(1, length + 1):
                value = value * np.uint32(_FACTOR) + text[positions - first - distance] + np.uint32(1)
            slots = (value * np.uint32(_MIXER)) >> np.uint32(self._shift)
            table = np.frombuffer(self._tables[length], dtype=np.int32)
            table[slots] = positions  # of equal slots, the last position remains


def continuation(log: TokenLog, token: int, match: Match, count: int) -> list[int]:
    """Return the `count` tokens that followed `match`; past the end of the text, the continuation repeats itself.

    Args:
        log: The text.
        token: The token after it, the newest.
        match: `find(log, token)`.
        count: Number of tokens.
    """
    found = [*log.ids[match.next : match.next + count]]
    if len(found) < count:
        found.append(token)
    period = len(found)
    while len(found) < count:
        found.append(found[-period])
    return found


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common start."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
