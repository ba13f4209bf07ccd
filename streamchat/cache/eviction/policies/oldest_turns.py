"""The policy `oldest-turns`: evicts the oldest whole turns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from streamchat.cache.eviction.policy import CacheView, Cut, cuts_of


def count_oldest(view: CacheView, turn_starts: Iterable[int]) -> int:
    """Return how many of the oldest evictable tokens to evict (StreamingLLM, arXiv:2309.17453, 3.2).

    Whole turns go first; tokens of the oldest remaining turn only if whole turns do not make enough room. Without
    starts this is the paper's rolling window. The reserve is never worth the newest whole turn.
    """
    must, wanted, droppable = view.must_evict, view.wanted, view.evictable_count
    counts = [view.evictable_before(view.ledger.slot_from(start)) for start in turn_starts]
    for count in counts:
        if wanted <= count < droppable:
            return count
    enough = [count for count in counts if count >= must]
    if enough and view.reserve:
        # The reserve does not fit: evict as many whole turns as possible but the newest, or all if necessary.
        return max([count for count in enough if count < droppable], default=enough[-1] if must else 0)
    if not must:
        return 0
    if enough:
        return enough[0]
    return min(droppable, view.clean_count(min(droppable, max(must, view.block))))


@dataclass(frozen=True)
class OldestTurns:
    """Evicts the oldest whole turns, and tokens of the oldest one if that is all there is."""

    name: str = "oldest-turns"

    def plan(self, view: CacheView) -> list[Cut]:
        """See `EvictionPolicy`."""
        return cuts_of(view.oldest(count_oldest(view, view.turn_starts)))


POLICY = OldestTurns()
