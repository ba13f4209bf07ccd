"""The policy `oldest-tokens`: the paper's rolling window."""

from __future__ import annotations

from dataclasses import dataclass

from streamchat.cache.eviction.policies.oldest_turns import count_oldest
from streamchat.cache.eviction.policy import CacheView, Cut, cuts_of


@dataclass(frozen=True)
class OldestTokens:
    """Evicts the oldest tokens, wherever turns start."""

    name: str = "oldest-tokens"

    def plan(self, view: CacheView) -> list[Cut]:
        """See `EvictionPolicy`."""
        return cuts_of(view.oldest(count_oldest(view, ())))


POLICY = OldestTokens()
