"""Identifies the contents of a cache, so that an earlier state can be put together from the same numbers."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Form:
    """Says which of several contents the slots of a token have.

    The same token has other keys after a rebase, and other keys and values after it was prefilled again. Both numbers
    are drawn at random, so that those of two branches of a conversation never agree by chance.
    """

    generation: int = 0
    """Drawn when the cache is emptied or its contents are replaced; 0 if it is not known."""
    epoch: int = 0
    """Drawn when the positions are rebased as well."""

    def rebased(self) -> Form:
        """Return the form after a rebase."""
        return Form(self.generation, _draw())


def new_form() -> Form:
    """Return the form of new contents."""
    return Form(_draw(), _draw())


def _draw() -> int:
    return 1 + secrets.randbelow(LARGEST)
