"""What leaves when the budget is full. Pure, over ledger and slots, so that it can be tested without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from streamchat.base.errors import CacheFullError, ChunkTooLargeError
from streamchat.cache.eviction.ledger import Ledger

Run = tuple[int, int]
"""`[first, stop)`."""


def merged_runs(runs: Iterable[Run]) -> list[Run]:
    """Ascending runs that do not touch each other, covering the same numbers."""
    merged: list[Run] = []
    for first, stop in sorted(runs):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged


def runs_without(runs: Iterable[Run], first: int, stop: int) -> list[Run]:
    """The runs, merged, without the numbers in `[first, stop)`."""
    parts = [part for a, b in runs for part in ((a, min(b, first)), (max(a, stop), b))]
    return merged_runs(part for part in parts if part[0] < part[1])


@dataclass(frozen=True)
class Retention:
    """What never leaves: the first tokens of the stream, and pinned runs of log indices."""

    cache_size: int
    num_sink_tokens: int
    pins: tuple[Run, ...] = ()
    """Ascending, not touching each other."""

    def kept_slots(self, ledger: Ledger) -> list[Run]:
        """Runs of slots that must stay, ascending and merged; the first begins at slot 0 where anything is kept."""
        slots = [(0, min(self.num_sink_tokens, len(ledger)))]
        slots += [(ledger.slot_from(first), ledger.slot_from(stop)) for first, stop in self.pins]
        return merged_runs([run for run in slots if run[0] < run[1]])

    def prefix(self, ledger: Ledger) -> int:
        """Slots at the front that stay: sinks, and what is pinned right behind them."""
        kept = self.kept_slots(ledger)
        return kept[0][1] if kept and kept[0][0] == 0 else 0

    def kept_count(self, ledger: Ledger) -> int:
        """Tokens held that never leave."""
        return sum(stop - first for first, stop in self.kept_slots(ledger))


@dataclass(frozen=True)
class Cut:
    """Drop `count` slots from slot `at` on; cuts of one eviction are made in order, each on what the last one left."""

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
    """The cuts that make room for `incoming` tokens: `plan_eviction`, with pinned runs skipped.

    Args:
        ledger: What is held. Not changed.
        retention: What never leaves.
        incoming: New tokens of the next forward.
        reserve: More room that is wanted.
        turn_starts: Log indices, ascending, at which turns begin.
        block: Token-level cuts drop at least this many.
        clean_cut: Log index -> the same or a later one at which the window may begin.
        evict: False refuses instead.

    Raises:
        ChunkTooLargeError: They do not fit beside what is kept.
        CacheFullError: They do not fit and nothing may be evicted.
    """
    kept = retention.kept_slots(ledger)
    # As if all that is kept stood at the front: then what may leave is one range, oldest first.
    front = sum(stop - first for first, stop in kept)

    def to_front(slot: int) -> int:
        return slot + sum(stop - max(first, slot) for first, stop in kept if stop > slot)

    def from_front(slot: int) -> int:
        slot -= front
        for first, stop in kept:
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
            f"{incoming} new tokens do not fit beside the {len(ledger)} in a cache of {retention.cache_size}, and "
            "nothing may be evicted"
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
    at, ends = 0, [*kept, (len(ledger), len(ledger))]
    before = 0  # slots passed in the ledger as it is
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
    """The cache before a forward, in slots."""

    length: int
    """Tokens held."""
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
    """How many tokens to drop behind the prefix so that `incoming` new ones fit (StreamingLLM, arXiv:2309.17453, 3.2).

    Oldest whole turns go first, where `boundaries` say where turns begin; tokens of the oldest turn that is left go
    only when whole turns cannot make the room. Without boundaries this is the paper's rolling window.

    Args:
        cache: The cache as it is.
        incoming: New tokens of the next forward; room for these is a must.
        reserve: More room that is wanted, but not at the price of the newest whole turn.
        boundaries: Slots, ascending, at which a turn begins; `cache.length` itself counts when the next token begins
            one.
        block: Token-level cuts drop at least this many, which divides the cost of an eviction.
        clean_cut: Slot -> the same or a later slot that may begin the window: not inside a character or a turn's
            header.

    Returns:
        The count of tokens to drop, 0 when there is room.

    Raises:
        ChunkTooLargeError: `incoming` does not fit beside the prefix even when all else is dropped.
    """
    room = cache.cache_size - cache.prefix
    if incoming > room:
        raise ChunkTooLargeError(
            f"{incoming} new tokens in one forward do not fit beside {cache.prefix} sink and pinned tokens in a cache "
            f"of {cache.cache_size}; prefill in chunks of at most {room}"
        )
    must = cache.length + incoming - cache.cache_size
    if must + reserve <= 0:
        return 0
    droppable = cache.length - cache.prefix
    cuts = [slot - cache.prefix for slot in boundaries if cache.prefix < slot <= cache.length]

    for cut in cuts:  # enough for the reserve as well, the newest whole turn stays
        if cut >= must + reserve and cut < droppable:
            return cut
    enough = [cut for cut in cuts if cut >= must]
    if enough and reserve:
        # The reserve is out of reach: the most whole turns short of everything, or everything where it must be.
        return max([cut for cut in enough if cut < droppable], default=enough[-1] if must > 0 else 0)
    if must <= 0:
        return 0
    if enough:
        return enough[0]
    cut = min(droppable, max(must, block))
    if clean_cut is not None:
        cut = min(droppable, clean_cut(cache.prefix + cut) - cache.prefix)
    return max(cut, must)
