"""Identifies the contents of a cache, so that an earlier state can be rebuilt from the same keys and values."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Form:
    """The version of the keys and values that a cache has for its tokens.

    The same token has other keys after a rebase, and other keys and values after it was prefilled again. Both numbers
    are drawn at random, so that those of two forks of a session never agree by chance.
    """

    generation: int = 0
    """Drawn when the cache is emptied or its contents are replaced; 0 if unknown."""
    epoch: int = 0
    """Drawn on the same occasions, and when positions are rebased."""

    def rebased(self) -> Form:
        """Return the form after a rebase."""
        return Form(self.generation, _draw())


def new_form() -> Form:
    """Return the form of new contents."""
    return Form(_draw(), _draw())


def _draw() -> int:
    return 1 + secrets.randbelow(LARGEST)
