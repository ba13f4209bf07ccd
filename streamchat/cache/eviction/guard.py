"""Asks a policy for a plan and checks it before anything is evicted, so that no policy can harm a cache.

A plan that breaks a rule is an error in the policy. It is not replaced by another plan, because a chat or a measurement
would then silently be one of another policy: the turn is rolled back, and the message names policy and rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from streamchat.base.errors import CacheFullError, ChunkTooLargeError, EvictionPlanError
from streamchat.cache.eviction.policy import CacheView, Cut, EvictionPolicy, Run


def plan_cuts(policy: EvictionPolicy, view: CacheView, *, evict: bool = True) -> list[Cut]:
    """Return the policy's cuts for the view, checked; none if there is room.

    Args:
        policy: Decides.
        view: The cache and the room that is needed. Not changed.
        evict: If False, raise instead of evicting.

    Raises:
        ChunkTooLargeError: The incoming tokens do not fit next to the retained ones.
        CacheFullError: They do not fit and `evict` is False.
        EvictionPlanError: The policy's plan breaks a rule.
    """
    length, size = len(view.ledger), view.cache_size
    if not evict:
        if view.must_evict and view.incoming:
            raise CacheFullError(
                f"{view.incoming} new tokens do not fit next to the {length} cached ones in a cache of {size}, and "
                "on_full = stop forbids eviction"
            )
        return []
    retained = length - view.evictable_count
    if view.incoming > size - retained:
        raise ChunkTooLargeError(
            f"{view.incoming} new tokens in one forward do not fit next to {retained} sink and pinned tokens in a "
            f"cache of {size}; prefill in chunks of at most {size - retained}"
        )
    if not view.wanted:
        return []
    clean = None if view.clean_cut is None else _CleanPlaces(view.clean_cut)
    # a copy of the ledger: the check must not depend on what the policy does to its own
    asked = replace(view, ledger=view.ledger.first(length), clean_cut=clean)
    cuts = list(policy.plan(asked))
    fault = _fault_in(cuts, view, clean)
    if fault:
        raise EvictionPlanError(
            f"the eviction policy {policy.name} made a plan that {fault}; nothing was evicted; choose another policy "
            "with `evict`"
        )
    return cuts


class _CleanPlaces:
    """Calls a `clean_cut`, and remembers the places that it returned: a plan may start text there."""

    def __init__(self, clean_cut: Callable[[int], int]) -> None:
        self._clean_cut = clean_cut
        self._returned: set[int] = set()

    def __call__(self, index: int) -> int:
        index = self._clean_cut(index)
        self._returned.add(index)
        return index

    def allows(self, index: int) -> bool:
        return index in self._returned or self._clean_cut(index) == index


def _fault_in(cuts: Sequence[Cut], view: CacheView, clean: _CleanPlaces | None) -> str:
    """Return which rule the cuts break, as the predicate of a sentence; '' for none."""
    length, dropped, last = len(view.ledger), list[Run](), -1
    for cut in cuts:
        gone = sum(stop - first for first, stop in dropped)
        if cut.count < 1 or cut.at < 0 or cut.at + cut.count > length - gone:
            return f"cuts {cut.count} slots at slot {cut.at} of {length - gone}, which is outside of the cache"
        if cut.at <= last:
            return f"cuts at slot {cut.at} after slot {last}, which is not in increasing order"
        dropped.append((cut.at + gone, cut.at + gone + cut.count))
        last = cut.at
    for first, stop in dropped:
        if stop - first > view.evictable_before(stop) - view.evictable_before(first):
            return f"evicts sink or pinned tokens: slots {first} to {stop - 1} are not all evictable"
    room = view.cache_size - length + sum(stop - first for first, stop in dropped)
    if room < view.incoming:
        return f"leaves room for {room} of {view.incoming} new tokens"
    borders = _borders(view)
    for slot in (edge for run in dropped for edge in run):
        index = view.ledger.index_at(slot)
        if clean is not None and slot not in borders and not clean.allows(index):
            return f"cuts at token {index}, which is inside a character or the header of a turn"
    return ""


def _borders(view: CacheView) -> set[int]:
    """Return the slots at which text may be cut in any case: turns start there, or earlier cuts and pins end."""
    ledger = view.ledger
    starts = [*view.turn_starts, *(first for first, _ in ledger.runs)]
    return {
        len(ledger),
        *(ledger.slot_from(start) for start in starts),
        *(edge for run in view.evictable for edge in run),
    }
