"""The ledger: which token of the log is in which cache slot. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """The token log index of each cache slot, in order.

    Stored as runs `[first, stop)` of consecutive log indices; there are few, because only evictions and crops make
    gaps. Slots and log indices both start at 0, and log indices strictly increase over the slots.
    """

    runs: list[tuple[int, int]] = field(default_factory=list)
    next_index: int = 0
    """Log index of the next token: the number of tokens fed and not undone."""

    def __len__(self) -> int:
        return sum(stop - first for first, stop in self.runs)

    def __iter__(self) -> Iterator[int]:
        for first, stop in self.runs:
            yield from range(first, stop)

    def append(self, count: int) -> None:
        """Append `count` new tokens in the last slots."""
        if count <= 0:
            return
        first, stop = self.next_index, self.next_index + count
        if self.runs and self.runs[-1][1] == first:
            self.runs[-1] = (self.runs[-1][0], stop)
        else:
            self.runs.append((first, stop))
        self.next_index = stop

    def evict(self, prefix: int, count: int) -> list[tuple[int, int]]:
        """Evict `count` slots after the first `prefix` ones; return the evicted runs of log indices."""
        head, rest = _split(self.runs, prefix)
        dropped, tail = _split(rest, count)
        self.runs = head + tail
        if head and tail and head[-1][1] == tail[0][0]:
            self.runs = [*head[:-1], (head[-1][0], tail[0][1]), *tail[1:]]
        return dropped

    def crop(self, count: int) -> list[tuple[int, int]]:
        """Remove the newest `count` slots and their log indices; return the removed runs."""
        self.runs, dropped = _split(self.runs, max(0, len(self) - count))
        if dropped:
            self.next_index = dropped[0][0]
        return dropped

    def first(self, count: int) -> Ledger:
        """Return a ledger of the first `count` slots, with the others evicted."""
        return Ledger(_split(self.runs, count)[0], self.next_index)

    def runs_before(self, index: int) -> list[tuple[int, int]]:
        """Return the runs of cached tokens with log indices below `index`."""
        return [(first, min(stop, index)) for first, stop in self.runs if first < index]

    def slot_from(self, index: int) -> int:
        """Return the first slot whose log index is at least `index`; the length if there is none."""
        slot = 0
        for first, stop in self.runs:
            if index <= first:
                return slot
            if index < stop:
                return slot + index - first
            slot += stop - first
        return slot

    def index_at(self, slot: int) -> int:
        """Return the log index of the token in `slot`; `next_index` for the slot after the last one."""
        for first, stop in self.runs:
            if slot < stop - first:
                return first + slot
            slot -= stop - first
        if slot == 0:
            return self.next_index
        raise IndexError(f"slot {slot} is past the end of the cache")

    def count_in(self, first: int, stop: int) -> int:
        """Return the number of cached tokens with log indices in `[first, stop)`."""
        return sum(max(0, min(stop, b) - max(first, a)) for a, b in self.runs)

    def clear(self) -> None:
        """Remove everything, including the count of fed tokens."""
        self.runs, self.next_index = [], 0


def _split(runs: list[tuple[int, int]], slot: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split runs before `slot`."""
    left: list[tuple[int, int]] = []
    for i, (first, stop) in enumerate(runs):
        if slot >= stop - first:
            left.append((first, stop))
            slot -= stop - first
            continue
        if slot > 0:
            return [*left, (first, first + slot)], [(first + slot, stop), *runs[i + 1 :]]
        return left, list(runs[i:])
    return left, []
