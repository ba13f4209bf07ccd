"""Plans what to evict when the budget is full. Pure functions of ledger and slots, testable without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from streamchat.base.errors import CacheFullError, ChunkTooLargeError
from streamchat.cache.eviction.ledger import Ledger

Run = tuple[int, int]
"""`[first, stop)`."""


def merged_runs(runs: Iterable[Run]) -> list[Run]:
    """Return ascending, non-adjacent runs that cover the same numbers."""
    merged: list[Run] = []
    for first, stop in sorted(runs):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged


def runs_without(runs: Iterable[Run], first: int, stop: int) -> list[Run]:
    """Return merged runs without the numbers in `[first, stop)`."""
    parts = [part for a, b in runs for part in ((a, min(b, first)), (max(a, stop), b))]
    return merged_runs(part for part in parts if part[0] < part[1])


@dataclass(frozen=True)
class Retention:
    """The tokens that are never evicted: the first tokens of the stream, and pinned runs of log indices."""

    cache_size: int
    num_sink_tokens: int
    pins: tuple[Run, ...] = ()
    """Ascending and non-adjacent."""

    def retained_slots(self, ledger: Ledger) -> list[Run]:
        """Return the runs of slots that are never evicted, ascending and merged."""
        slots = [(0, min(self.num_sink_tokens, len(ledger)))]
        slots += [(ledger.slot_from(first), ledger.slot_from(stop)) for first, stop in self.pins]
        return merged_runs([run for run in slots if run[0] < run[1]])

    def prefix(self, ledger: Ledger) -> int:
        """Return the number of slots at the front that are never evicted: sinks, and pins directly after them."""
        retained = self.retained_slots(ledger)
        return retained[0][1] if retained and retained[0][0] == 0 else 0

    def retained_count(self, ledger: Ledger) -> int:
        """Return the number of cached tokens that are never evicted."""
        return sum(stop - first for first, stop in self.retained_slots(ledger))


@dataclass(frozen=True)
class Cut:
    """Drop `count` slots from slot `at` on. The cuts of one eviction apply in order, each to the result of the last."""

    at: int
    count: int


def plan_cuts(
    ledger: Ledger,
    retention: Retention,
    incoming: int,
    *,
    reserve: int = 0,
    turn_starts: Sequence[int] = (),
    block: int = 1,
    clean_cut: Callable[[int], int] | None = None,
    evict: bool = True,
) -> list[Cut]:
    """Return the cuts that make room for `incoming` tokens: `plan_eviction`, with pinned runs skipped.

    Args:
        ledger: The cached tokens. Not changed.
        retention: The tokens that are never evicted.
        incoming: New tokens of the next forward.
        reserve: Additional room, if possible.
        turn_starts: Ascending log indices at which turns start.
        block: Minimum tokens per token-level cut.
        clean_cut: Maps a log index to the same or a later one at which the window may start.
        evict: If False, raise instead of evicting.

    Raises:
        ChunkTooLargeError: They do not fit next to the retained tokens.
        CacheFullError: They do not fit and `evict` is False.
    """
    retained = retention.retained_slots(ledger)
    # Renumber the slots with all retained ones at the front: the evictable ones are then one range, oldest first.
    front = sum(stop - first for first, stop in retained)

    def to_front(slot: int) -> int:
        return slot + sum(stop - max(first, slot) for first, stop in retained if stop > slot)

    def from_front(slot: int) -> int:
        slot -= front
        for first, stop in retained:
            if slot < first:
                break
            slot += stop - first
        return slot

    def clean(slot: int) -> int:
        assert clean_cut is not None
        return to_front(ledger.slot_from(clean_cut(ledger.index_at(from_front(slot)))))

    occupancy = Occupancy(len(ledger), front, retention.cache_size)
    if not evict and incoming > 0 and len(ledger) + incoming > retention.cache_size:
        raise CacheFullError(
            f"{incoming} new tokens do not fit next to the {len(ledger)} cached ones in a cache of "
            f"{retention.cache_size}, and on_full = stop forbids eviction"
        )
    count = 0
    if evict:
        count = plan_eviction(
            occupancy,
            incoming,
            reserve=reserve,
            boundaries=[to_front(ledger.slot_from(start)) for start in turn_starts],
            block=block,
            clean_cut=clean if clean_cut else None,
        )
    cuts: list[Cut] = []
    at, ends = 0, [*retained, (len(ledger), len(ledger))]
    before = 0  # slots passed, before any cut
    for first, stop in ends:
        gap = min(count, first - before)
        if gap:
            cuts.append(Cut(at, gap))
            count -= gap
        at += stop - before - gap
        before = stop
    return cuts


@dataclass(frozen=True)
class Occupancy:
    """Slots in use before a forward."""

    length: int
    """Cached tokens."""
    prefix: int
    """Sinks and pinned tokens at the front, never evicted."""
    cache_size: int
    """The budget."""


def plan_eviction(
    cache: Occupancy,
    incoming: int,
    *,
    reserve: int = 0,
    boundaries: Sequence[int] = (),
    block: int = 1,
    clean_cut: Callable[[int], int] | None = None,
) -> int:
    """Return how many tokens to evict after the prefix so that `incoming` fit (StreamingLLM, arXiv:2309.17453, 3.2).

    Evicts the oldest whole turns, delimited by `boundaries`; tokens of the oldest remaining turn only if whole turns
    do not make enough room. Without boundaries this is the paper's rolling window.

    Args:
        cache: Current occupancy.
        incoming: New tokens of the next forward, which must fit.
        reserve: Additional room, if possible without evicting the newest whole turn.
        boundaries: Ascending slots at which a turn starts; may include `cache.length` if the next token starts one.
        block: Minimum tokens per token-level cut, which amortizes the cost of an eviction.
        clean_cut: Maps a slot to the same or a later one at which the window may start: not inside a character or a
            turn's header.

    Returns:
        The number of tokens to evict, 0 if there is room.

    Raises:
        ChunkTooLargeError: `incoming` does not fit next to the prefix even if everything else is evicted.
    """
    room = cache.cache_size - cache.prefix
    if incoming > room:
        raise ChunkTooLargeError(
            f"{incoming} new tokens in one forward do not fit next to {cache.prefix} sink and pinned tokens in a cache "
            f"of {cache.cache_size}; prefill in chunks of at most {room}"
        )
    must = cache.length + incoming - cache.cache_size
    if must + reserve <= 0:
        return 0
    droppable = cache.length - cache.prefix
    cuts = [slot - cache.prefix for slot in boundaries if cache.prefix < slot <= cache.length]

    for cut in cuts:  # makes room for the reserve too, without evicting the newest whole turn
        if cut >= must + reserve and cut < droppable:
            return cut
    enough = [cut for cut in cuts if cut >= must]
    if enough and reserve:
        # The reserve does not fit: evict as many whole turns as possible but the newest, or all if necessary.
        return max([cut for cut in enough if cut < droppable], default=enough[-1] if must > 0 else 0)
    if must <= 0:
        return 0
    if enough:
        return enough[0]
    cut = min(droppable, max(must, block))
    if clean_cut is not None:
        cut = min(droppable, clean_cut(cache.prefix + cut) - cache.prefix)
    return max(cut, must)
