"""Sees a reply repeat itself: the same cycle of tokens over and over, without end."""

from __future__ import annotations

import numpy as np

from streamchat.config.settings import LoopGuard

LONGEST = 128
"""Longest cycle, in tokens."""
REPEATS = 6
"""A cycle must occur this often in a row, ..."""
TOKENS = 128
"""... and fill this many tokens: `ha ha ha` needs more repeats than a sentence."""
SMALL_MODEL = 3_000_000_000
"""Models with fewer weights are guarded by default: larger ones rarely loop."""


def is_guarded(setting: LoopGuard, parameters: int) -> bool:
    """Return whether the replies of a model with so many weights are stopped when they loop."""
    return setting == "on" or (setting == "auto" and parameters < SMALL_MODEL)


class LoopWatch:
    """Follows one reply, token by token. Takes a few operations of NumPy per token.

    Args:
        repeats: Number of occurrences that make a loop.
        tokens: Number of tokens that all occurrences together must have.
    """

    def __init__(self, repeats: int = REPEATS, tokens: int = TOKENS) -> None:
        self._periods = np.arange(LONGEST, 0, -1)
        self._needed = np.maximum(repeats * self._periods, tokens)
        self._latest = np.full(LONGEST, -1, dtype=np.int64)
        """The latest tokens, the newest last: each is one period before the next token."""
        self._equal = np.zeros(LONGEST, dtype=np.int64)
        """For each period: the number of newest tokens that equal those one period before them."""

    def is_loop_with(self, token: int) -> bool:
        """Add a token; return whether the text ends in a loop."""
        self._equal = np.where(self._latest == token, self._equal + 1, 0)
        self._latest[:-1] = self._latest[1:]
        self._latest[-1] = token
        return bool((self._equal + self._periods >= self._needed).any())

    @property
    def cycle(self) -> tuple[int, int]:
        """The shortest cycle at the end of the text: its tokens, and how often it occurs; (0, 0) without one."""
        occurrences = (self._equal + self._periods) // self._periods
        found = np.flatnonzero(occurrences > 1)
        return (int(self._periods[found[-1]]), int(occurrences[found[-1]])) if len(found) else (0, 0)
