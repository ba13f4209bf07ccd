"""How a cache evicts, and what an eviction was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from streamchat.base.events.cache import Trigger
from streamchat.cache.eviction.policy import EvictionPolicy, Run


@dataclass(frozen=True)
class Eviction:
    """One compression: tokens evicted from every layer at once."""

    dropped: tuple[Run, ...]
    """Runs `[first, stop)` of token log indices."""
    length_before: int
    length_after: int
    trigger: Trigger

    @property
    def count(self) -> int:
        """Evicted tokens."""
        return sum(stop - first for first, stop in self.dropped)


@dataclass
class TurnPlan:
    """Room needed by the turn that is about to start."""

    incoming: int
    reserve: int


@dataclass
class EvictionOptions:
    """How to evict; the defaults are the paper's rolling window."""

    policy: EvictionPolicy | str = "oldest-tokens"
    """What to evict: a name of `streamchat.base.eviction_policies`, or a policy of your own. Whole turns are known only
    if `begin_turn` marks them."""
    on_full: Literal["evict", "stop"] = "evict"
    """When the budget is reached: evict, or raise `CacheFullError` for a forward that does not fit."""
    block: int = 1
    """Minimum tokens per token-level eviction."""
    clean_cut: Callable[[int], int] | None = None
    """Maps a token log index to the same or a later one at which the window may start."""
    before_evict: Callable[[], None] | None = field(default=None, repr=False)
    """Called before each eviction, with the cache still complete."""
    on_evict: Callable[[Eviction], None] | None = field(default=None, repr=False)
    """Called after every eviction."""
