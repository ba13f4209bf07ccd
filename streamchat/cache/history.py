"""The latest changes of a cache, each of which can be undone to the bit without a forward pass.

An eviction moves only the tokens before the cut, which are written from their originals, and leaves the window where
it is. So its inverse needs the evicted slots only: O(evicted tokens) of memory and time, not O(cache). A rebase rotates
the window in place; for its inverse the keys are copied, once per thousands of tokens.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Run, merged_runs
from streamchat.cache.layers.cuts import StateBefore, save_cut, save_rebase, undo_cut, undo_rebase
from streamchat.cache.layers.layer import StreamingLayer

_log = logging.getLogger(__name__)
SMALLEST_LIMIT = 64 << 20
"""Bytes that a history may always have."""


class Cache(Protocol):
    """The parts of a `StreamingCache` that changes are made to."""

    ledger: Ledger

    @property
    def streaming_layers(self) -> list[StreamingLayer]:
        """Its layers."""
        ...


class Step(Protocol):
    """A change of all layers."""

    @property
    def nbytes(self) -> int:
        """Bytes that undoing it needs."""
        ...

    def undo(self, cache: Cache, stop: int) -> None:
        """Undo it in layers and ledger of a `cache` whose tokens from log index `stop` on were removed."""
        ...


@dataclass(frozen=True)
class CutStep:
    """An eviction of consecutive slots."""

    at: int
    """The first evicted slot."""
    dropped: tuple[Run, ...]
    """Log indices of the evicted tokens."""
    before: StateBefore
    kept: int
    """How many of them `before` has, from the first one on."""

    @property
    def count(self) -> int:
        """Evicted tokens."""
        return sum(stop - first for first, stop in self.dropped)

    @property
    def nbytes(self) -> int:
        """See `Step`."""
        return self.before.nbytes

    def undo(self, cache: Cache, stop: int) -> None:
        """See `Step`."""
        back = [(first, min(last, stop)) for first, last in self.dropped if first < stop]
        keep = sum(last - first for first, last in back)
        undo_cut(cache.streaming_layers, self.before, self.at, self.count, keep)
        cache.ledger.runs = merged_runs([*cache.ledger.runs, *back])


@dataclass(frozen=True)
class RebaseStep:
    """A move of all positions."""

    before: StateBefore

    @property
    def nbytes(self) -> int:
        """See `Step`."""
        return self.before.nbytes

    def undo(self, cache: Cache, stop: int) -> None:
        """See `Step`."""
        undo_rebase(cache.streaming_layers, self.before)


def evicted_by(step: Step) -> EvictedTokens | None:
    """Return the tokens that a change of a cache evicted and that are kept; None if there are none."""
    if not isinstance(step, CutStep) or not step.before.slots:
        return None
    runs, left = list[Run](), step.kept
    for first, stop in step.dropped:
        runs += [(first, min(stop, first + left))] if left > 0 else []
        left -= stop - first
    return EvictedTokens(tuple(runs), step.before.slots, step.before.originals, step.before.base + step.at)


class CacheHistory:
    """Records the changes of one cache. `StreamingCache.history` calls it before each of them.

    Args:
        cache: The cache; its layers hold tokens only, without recurrent states.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.limit_bytes = SMALLEST_LIMIT
        """Memory for the changes; the oldest ones are dropped first."""
        self._steps: deque[Step] = deque()
        self._first = 0
        """Number of the oldest step that is kept."""
        self._bytes = 0
        self._own_from: int | None = None
        self.on_evicted: Callable[[EvictedTokens], None] | None = None
        """Called with all tokens that are evicted, before that happens."""

    @property
    def mark(self) -> int:
        """The number of the next change, for `undo_to`."""
        return self._first + len(self._steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all changes."""
        return self._bytes

    def reaches(self, mark: int) -> bool:
        """Return whether the state at `mark` can be restored."""
        return self._first <= mark <= self.mark

    def since(self, mark: int) -> Iterator[Step]:
        """Yield the changes since `mark`, oldest first, as far as they are kept."""
        for number, step in enumerate(self._steps, self._first):
            if number >= mark:
                yield step

    def begin_turn(self) -> None:
        """Start a turn at the next token. Changes that it makes are undone up to here or further.

        So the tokens of the turn itself need not be kept when it evicts them.
        """
        self._own_from = self._cache.ledger.next_index

    def before_cut(self, at: int, dropped: tuple[Run, ...]) -> None:
        """Record the eviction of the tokens `dropped` from slot `at` on, before it happens."""
        stop = self._stop
        older = sum(min(last, stop) - first for first, last in dropped if first < stop)
        front = min(at, self._cache.ledger.slot_from(stop))
        layers = self._cache.streaming_layers
        self._record(lambda: CutStep(at, dropped, save_cut(layers, at, older, front), older))
        if self.on_evicted is not None:
            own = [(max(first, stop), last) for first, last in dropped if last > stop]
            self._report(at + older, tuple(own))

    def _report(self, at: int, own: tuple[Run, ...]) -> None:
        """Call `on_evicted` with the tokens of the newest step, and those of the running turn from slot `at` on."""
        assert self.on_evicted is not None
        older = evicted_by(self._steps[-1]) if self._steps else None
        if older is not None:
            self.on_evicted(older)
        if own:
            count = sum(stop - first for first, stop in own)
            try:
                before = save_cut(self._cache.streaming_layers, at, count, 0)
            except (RuntimeError, MemoryError):
                _log.warning("not enough memory to archive %d evicted tokens", count, exc_info=True)
                return
            self.on_evicted(EvictedTokens(own, before.slots, before.originals, before.base + at))

    def before_rebase(self) -> None:
        """Record a rebase, before it happens."""
        front = self._cache.ledger.slot_from(self._stop)
        self._record(lambda: RebaseStep(save_rebase(self._cache.streaming_layers, front)))

    @property
    def _stop(self) -> int:
        """Log index from which on tokens need not be kept."""
        return self._cache.ledger.next_index if self._own_from is None else self._own_from

    def _record(self, step: Callable[[], Step]) -> None:
        try:
            self.add(step())
        except (RuntimeError, MemoryError):
            _log.warning("not enough memory to record a change of the cache; undo will need a prefill", exc_info=True)
            self.clear()

    def add(self, step: Step) -> None:
        """Record a change."""
        self._steps.append(step)
        self._bytes += step.nbytes
        while self._bytes > self.limit_bytes and len(self._steps) > 1:
            self._drop_oldest()

    def undo_to(self, mark: int, stop: int) -> None:
        """Undo all changes since `mark`. Layers and ledger are then as they were, up to log index `stop`.

        Args:
            mark: A `mark` that the history reaches.
            stop: Log index of the next token at that mark, or earlier. The cache has no newer tokens.
        """
        assert self.reaches(mark)
        with torch.inference_mode(False), torch.no_grad():
            while self.mark > mark:
                step = self._steps.pop()
                self._bytes -= step.nbytes
                step.undo(self._cache, stop)

    def forget_before(self, mark: int) -> None:
        """Drop the changes before `mark`."""
        while self._steps and self._first < mark:
            self._drop_oldest()

    def clear(self) -> None:
        """Drop all changes: no earlier state can be restored."""
        self._first = self.mark + 1
        self._steps.clear()
        self._bytes = 0

    def _drop_oldest(self) -> None:
        self._bytes -= self._steps.popleft().nbytes
        self._first += 1
