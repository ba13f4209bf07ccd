"""Finds text that a reply repeats at its end, by its words: independent of the loop guard, which looks at tokens."""

from __future__ import annotations

LONGEST = 48
"""Words of the longest cycle."""
TIMES, WORDS = 10, 160
"""A cycle that occurs so often and fills so many words is endless: more than the guard needs."""


def is_endless(words: int, times: int) -> bool:
    """Return whether a cycle of `words` words that occurs `times` times is an endless repetition."""
    return times >= TIMES and words * times >= WORDS


def repeated_end(text: str) -> tuple[int, int]:
    """Return the number of words that `text` repeats at its end, and how often they occur; (0, 0) if it does not.

    Of several possible cycles, this is the one that fills most of the text; at most `LONGEST` words.
    """
    words, best = text.split(), (0, 0)
    for period in range(1, min(LONGEST, len(words) // 2) + 1):
        length = period
        while length < len(words) and words[-1 - length] == words[-1 - length + period]:
            length += 1
        times = length // period
        if times > 1 and times * period > best[0] * best[1]:
            best = period, times
    return best
