"""Keys and values of tokens as they were cached before a change, outside of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamchat.cache.eviction.policy import Run
from streamchat.cache.form import Form
from streamchat.cache.layers.slots import CopiedStates

Part = Literal["evicted", "moved", "rebased"]
"""Why they were copied: the tokens were evicted; they stay cached, and are moved for the first time; they stay cached,
and their keys are rotated in place. The last kind has only what depends on positions, usually no values."""


@dataclass(frozen=True)
class EvictedTokens:
    """Keys and values of the tokens of one change, as they were cached. The tensors are in main memory."""

    runs: tuple[Run, ...]
    """Token log indices."""
    slots: CopiedStates
    originals: CopiedStates
    """Unrotated float32 copies of the first tokens, if these had been moved before."""
    position: int
    """Absolute position of the first one; the others follow."""
    part: Part = "evicted"
    form: Form = Form()
    """That of the cache before the change."""
    moved: int = 0
    """Number of tokens, from the first one, that had been moved before."""
    is_exact: bool = True
    """False if numbers were rounded on the way."""

    @property
    def count(self) -> int:
        """Number of tokens."""
        return sum(stop - first for first, stop in self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.slots.nbytes + self.originals.nbytes
