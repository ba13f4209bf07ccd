"""Keys and values of evicted tokens, outside of the cache."""

from __future__ import annotations

from dataclasses import dataclass

from streamchat.cache.eviction.policy import Run
from streamchat.cache.layers.slots import CopiedStates


@dataclass(frozen=True)
class EvictedTokens:
    """Keys and values of the tokens of one eviction, as they were cached. The tensors are in main memory."""

    runs: tuple[Run, ...]
    """Token log indices."""
    slots: CopiedStates
    originals: CopiedStates
    """Unrotated float32 copies of the first tokens, if these had been moved before."""
    position: int
    """Absolute position of the first one; the others follow."""

    @property
    def count(self) -> int:
        """Number of tokens."""
        return sum(stop - first for first, stop in self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.slots.nbytes + self.originals.nbytes
