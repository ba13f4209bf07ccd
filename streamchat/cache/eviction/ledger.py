"""Which token of the log sits in which cache slot. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """For each cache slot, in order, the index in the token log that it came from.

    Kept as runs `[first, stop)` of consecutive log indices; there are few, because only evictions and crops make gaps.
    Slots and log indices both count from 0, and log indices are strictly increasing over the slots.
    """

    runs: list[tuple[int, int]] = field(default_factory=list)
    next_index: int = 0
    """Log index of the next token: the number of tokens fed and not taken back."""

    def __len__(self) -> int:
        return sum(stop - first for first, stop in self.runs)

    def __iter__(self) -> Iterator[int]:
        for first, stop in self.runs:
            yield from range(first, stop)

    def append(self, count: int) -> None:
        """`count` new tokens were fed and hold the last slots."""
        if count <= 0:
            return
        first, stop = self.next_index, self.next_index + count
        if self.runs and self.runs[-1][1] == first:
            self.runs[-1] = (self.runs[-1][0], stop)
        else:
            self.runs.append((first, stop))
        self.next_index = stop

    def evict(self, prefix: int, count: int) -> list[tuple[int, int]]:
        """Drop `count` slots that follow the first `prefix` ones; return the dropped runs of log indices."""
        head, rest = _split(self.runs, prefix)
        dropped, tail = _split(rest, count)
        self.runs = head + tail
        if head and tail and head[-1][1] == tail[0][0]:
            self.runs = [*head[:-1], (head[-1][0], tail[0][1]), *tail[1:]]
        return dropped

    def crop(self, count: int) -> list[tuple[int, int]]:
        """Drop the newest `count` slots as if never fed; return the dropped runs of log indices."""
        self.runs, dropped = _split(self.runs, max(0, len(self) - count))
        if dropped:
            self.next_index = dropped[0][0]
        return dropped

    def first(self, count: int) -> Ledger:
        """A ledger of the first `count` slots, as if the others had been evicted."""
        return Ledger(_split(self.runs, count)[0], self.next_index)

    def runs_before(self, index: int) -> list[tuple[int, int]]:
        """Runs of the tokens in the cache with log indices below `index`."""
        return [(first, min(stop, index)) for first, stop in self.runs if first < index]

    def slot_from(self, index: int) -> int:
        """First slot whose token has a log index of at least `index`; the length when there is none."""
        slot = 0
        for first, stop in self.runs:
            if index <= first:
                return slot
            if index < stop:
                return slot + index - first
            slot += stop - first
        return slot

    def index_at(self, slot: int) -> int:
        """Log index of the token in `slot`; `next_index` for the slot after the last one."""
        for first, stop in self.runs:
            if slot < stop - first:
                return first + slot
            slot -= stop - first
        if slot == 0:
            return self.next_index
        raise IndexError(f"slot {slot} past the end of the cache")

    def count_in(self, first: int, stop: int) -> int:
        """How many tokens with log indices in `[first, stop)` are still in the cache."""
        return sum(max(0, min(stop, b) - max(first, a)) for a, b in self.runs)

    def clear(self) -> None:
        """Forget everything, also the count of tokens fed."""
        self.runs, self.next_index = [], 0


def _split(runs: list[tuple[int, int]], slot: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Cut runs before `slot`."""
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
