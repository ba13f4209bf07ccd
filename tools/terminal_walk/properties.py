"""The properties that every screen of a walk must have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_CACHED = re.compile(r"(?:cached +|cache )([\d,]+) ?/ ?([\d,]+)|([\d,]+)\s+of\s+([\d,]+)\s+cached")
_TURN = re.compile(r"\bYou · (\d+)")
EDGE = "context starts"


class ScreenProperties:
    """Checks screens one after the other.

    Args:
        budget: The cache budget.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._evicted = 0
        """The newest turn that was seen above the edge of memory."""

    def restored(self) -> None:
        """Note that evicted tokens may have been restored, for example by an undo."""
        self._evicted = 0

    def problems(self, lines: Sequence[str]) -> Iterator[str]:
        """Yield what is wrong with a screen, one sentence each."""
        for length, size in self._lengths(lines):
            if size == self._budget and length > size:
                yield f"the screen shows {length} cached tokens, and the budget is {size}"
        edges = [at for at, line in enumerate(lines) if EDGE in line]
        if len(edges) > 1:
            yield f"the screen shows {len(edges)} edges of memory"
        if len(edges) != 1:
            return
        turns = [(at, int(found[1])) for at, line in enumerate(lines) if (found := _TURN.search(line))]
        below = [turn for at, turn in turns if at > edges[0]]
        if below and min(below) <= self._evicted:
            yield f"turn {min(below)} is in memory again, and turn {self._evicted} was evicted"
        self._evicted = max([self._evicted, *(turn for at, turn in turns if at < edges[0])])

    def _lengths(self, lines: Sequence[str]) -> Iterator[tuple[int, int]]:
        for line in lines:
            for found in _CACHED.finditer(line):
                length, size = found[1] or found[3], found[2] or found[4]
                yield int(length.replace(",", "")), int(size.replace(",", ""))
