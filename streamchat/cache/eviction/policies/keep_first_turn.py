"""The policy `keep-first-turn`: the first exchange stays, too.

A conversation often starts with what it is about. Under this policy that start stays in context without a pin.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from streamchat.cache.eviction.policies.oldest_turns import POLICY as OLDEST_TURNS
from streamchat.cache.eviction.policy import CacheView, Cut, Run, merged_runs


def first_turn(view: CacheView) -> Run | None:
    """Return the evictable slots of the first turn; None if it lost tokens, is pinned, or is the only turn."""
    if len(view.turns) < 2:
        return None
    first, stop = view.turns[0]
    start, intact = view.ledger.runs[0]
    # without a gap since the start of the stream, and with at most one turn started up to there
    is_first = start == 0 and first < intact and bisect_right(view.turn_starts, view.ledger.index_at(first)) <= 1
    return (first, stop) if is_first else None


@dataclass(frozen=True)
class KeepFirstTurn:
    """Evicts the oldest whole turns but the first one, as long as that takes at most half of the evictable room.

    If nothing else would make enough room, the first turn is evicted like any other.
    """

    name: str = "keep-first-turn"

    def plan(self, view: CacheView) -> list[Cut]:
        """See `EvictionPolicy`."""
        kept = first_turn(view)
        if kept is None:
            return OLDEST_TURNS.plan(view)
        size = kept[1] - kept[0]
        room = view.cache_size - len(view.ledger) + view.evictable_count
        if size > room // 2 or view.must_evict > view.evictable_count - size:
            return OLDEST_TURNS.plan(view)
        return OLDEST_TURNS.plan(replace(view, retained=tuple(merged_runs([*view.retained, kept]))))


POLICY = KeepFirstTurn()
