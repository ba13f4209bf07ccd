"""What an eviction policy is: it looks at a `CacheView` and returns the cuts that it wants. Needs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from streamchat.cache.eviction.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

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


def cuts_of(runs: Iterable[Run]) -> list[Cut]:
    """Return the cuts that drop these runs of slots, which are numbered before any cut."""
    cuts, dropped = list[Cut](), 0
    for first, stop in merged_runs(run for run in runs if run[0] < run[1]):
        cuts.append(Cut(first - dropped, stop - first))
        dropped += stop - first
    return cuts


def starts_after(starts: Iterable[int], dropped: Sequence[Run], retention: Retention, ledger: Ledger) -> list[int]:
    """Return the turn starts that are still boundaries after an eviction.

    A turn that lost its first token is none any more, nor is a retained one that is older than an evicted token.

    Args:
        starts: Ascending log indices.
        dropped: Ascending runs of log indices that were evicted; not empty.
        retention: The tokens that are never evicted.
        ledger: The tokens that are left.
    """
    retained = retention.retained_slots(ledger)

    def is_boundary(start: int) -> bool:
        if start >= dropped[-1][1]:
            return True
        slot = ledger.slot_from(start)
        return bool(ledger.count_in(start, start + 1)) and not any(a <= slot < b for a, b in retained)

    return [start for start in starts if is_boundary(start)]


@dataclass(frozen=True)
class CacheView:
    """What a policy may look at: the cached tokens, those that are never evicted, and the room that is needed."""

    ledger: Ledger
    """The log index of each slot; a copy."""
    retained: tuple[Run, ...]
    """Runs of slots that must stay, ascending and merged."""
    cache_size: int
    incoming: int = 0
    """New tokens that must fit."""
    reserve: int = 0
    """Additional room, if possible."""
    turn_starts: tuple[int, ...] = ()
    """Ascending log indices at which turns start; may include that of the next token."""
    block: int = 1
    """Minimum tokens per token-level cut, which amortizes the cost of an eviction."""
    clean_cut: Callable[[int], int] | None = None
    """Maps a log index to the same or a later one at which text may start: not inside a character or a turn's header.
    None if text may start anywhere."""
    fetch_keys: Callable[[int, int], Iterable[Tensor]] | None = None
    """Returns the keys of slots `[first, stop)`, layer by layer, (batch, num_kv_heads, stop - first, head_dim) in
    float32 and without their rotation, so that keys of different positions compare. Each call reads them anew. None
    without keys, when an eviction is simulated or the next forward prefills the cache again."""

    @property
    def must_evict(self) -> int:
        """Number of tokens that must be evicted; the incoming tokens do not fit otherwise."""
        return max(0, len(self.ledger) + self.incoming - self.cache_size)

    @property
    def wanted(self) -> int:
        """Number of tokens to evict for the incoming tokens and the reserve."""
        return max(0, len(self.ledger) + self.incoming + self.reserve - self.cache_size)

    @cached_property
    def evictable(self) -> tuple[Run, ...]:
        """The runs of slots that may be evicted, oldest first."""
        ends = [0, *(edge for run in self.retained for edge in run), len(self.ledger)]
        pairs = zip(ends[::2], ends[1::2], strict=True)
        return tuple((first, stop) for first, stop in pairs if first < stop)

    @property
    def evictable_count(self) -> int:
        """Number of tokens that may be evicted."""
        return sum(stop - first for first, stop in self.evictable)

    @cached_property
    def turns(self) -> tuple[Run, ...]:
        """The runs of slots of each turn, or of what is evictable of it, oldest first.

        A turn that lost its start, or tokens in the middle, is what is left of it.
        """
        gaps = [self.ledger.slot_from(first) for first, _ in self.ledger.runs]
        borders = sorted({*gaps, *(self.ledger.slot_from(start) for start in self.turn_starts)})
        found: list[Run] = []
        for first, stop in self.evictable:
            edges = [first, *(border for border in borders if first < border < stop), stop]
            found += pairwise(edges)
        return tuple(found)

    def oldest(self, count: int) -> list[Run]:
        """Return the runs of the `count` oldest evictable slots."""
        found = []
        for first, stop in self.evictable:
            if count <= 0:
                break
            found.append((first, min(stop, first + count)))
            count -= stop - first
        return found

    def evictable_before(self, slot: int) -> int:
        """Return how many evictable slots are before `slot`."""
        return sum(max(0, min(stop, slot) - first) for first, stop in self.evictable)

    def clean_count(self, count: int) -> int:
        """Return the same or a larger number of oldest tokens to evict, so that what follows starts at a clean place.

        It can exceed the number of evictable tokens.
        """
        if self.clean_cut is None:
            return count
        slot = count  # of the first token that would stay
        for first, stop in self.retained:
            if slot < first:
                break
            slot += stop - first
        return self.evictable_before(self.ledger.slot_from(self.clean_cut(self.ledger.index_at(slot))))


class EvictionPolicy(Protocol):
    """Decides which tokens to evict. It has no state: the same view gives the same cuts."""

    @property
    def name(self) -> str:
        """The name in the setting `evict`."""
        ...

    def plan(self, view: CacheView) -> Sequence[Cut]:
        """Return the cuts that make room for the incoming tokens, and for the reserve if that is worth it.

        Called when incoming tokens and reserve do not fit. `streamchat.cache.eviction.guard` says what a plan must be.
        """
        ...
