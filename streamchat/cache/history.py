"""Records the latest changes of a cache, so that each can be undone to the bit without a forward pass.

An eviction does not move the window. It moves only the tokens before the cut, which are written from their originals
(unrotated float32 copies). To undo it, only the evicted slots are needed: O(evicted tokens) of memory and time, not
O(cache). A rebase rotates the keys of the window in place, once per thousands of tokens. To undo it, the keys are
copied.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from streamchat.cache.evicted import EvictedTokens, Part
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Run, merged_runs
from streamchat.cache.form import Form
from streamchat.cache.layers.cuts import StateBefore, save_cut, save_rebase, undo_cut, undo_rebase
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.slots import CopiedStates, narrowed

_log = logging.getLogger(__name__)
SMALLEST_LIMIT = 64 << 20
"""Memory that a history may always use, in bytes."""


class Cache(Protocol):
    """The parts of a `StreamingCache` that change."""

    ledger: Ledger
    form: Form

    @property
    def streaming_layers(self) -> list[StreamingLayer]:
        """Its layers."""
        ...


class Step(Protocol):
    """A recorded change of all layers."""

    @property
    def nbytes(self) -> int:
        """Bytes of what is recorded to undo it."""
        ...

    def undo(self, cache: Cache, stop: int) -> None:
        """Undo it in the layers and the ledger of `cache`. Tokens from log index `stop` on were removed before."""
        ...


S = TypeVar("S", bound=Step)


@dataclass(frozen=True)
class CutStep:
    """An eviction of consecutive slots."""

    at: int
    """The first evicted slot."""
    dropped: tuple[Run, ...]
    """Log indices of the evicted tokens."""
    before: StateBefore
    kept: int
    """Number of evicted tokens that `before` has, starting with the first one."""
    form: Form = Form()
    """That of the cache before the eviction."""

    @property
    def count(self) -> int:
        """Number of evicted tokens."""
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
    """A rebase: a move of all positions."""

    before: StateBefore
    form: Form
    """That of the cache before the rebase."""

    @property
    def nbytes(self) -> int:
        """See `Step`."""
        return self.before.nbytes

    def undo(self, cache: Cache, stop: int) -> None:
        """See `Step`."""
        undo_rebase(cache.streaming_layers, self.before)
        cache.form = self.form


def evicted_by(step: Step) -> EvictedTokens | None:
    """Return the recorded tokens that a step evicted; None if there are none."""
    if not isinstance(step, CutStep) or not step.before.slots:
        return None
    runs, left = list[Run](), step.kept
    for first, stop in step.dropped:
        runs += [(first, min(stop, first + left))] if left > 0 else []
        left -= stop - first
    before = step.before
    moved = min(step.kept, max(0, before.known - step.at))
    return EvictedTokens(
        tuple(runs), before.slots, before.originals, before.base + step.at, form=step.form, moved=moved
    )


class CacheHistory:
    """Records the changes of one cache. A `StreamingCache` calls its `history` before each change.

    Args:
        cache: The cache; no layer may have a recurrent state.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.limit_bytes = SMALLEST_LIMIT
        """Memory for the changes. Beyond it, the oldest ones are dropped, but never the newest one."""
        self._steps: deque[Step] = deque()
        self._first = 0
        """Number of the oldest recorded step."""
        self._bytes = 0
        self._own_from: int | None = None
        self.on_evicted: Callable[[EvictedTokens], None] | None = None
        """Called with the tokens that are about to be evicted, moved for the first time, or rebased."""

    @property
    def mark(self) -> int:
        """The number of the next change, for `undo_to`."""
        return self._first + len(self._steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all recorded changes."""
        return self._bytes

    def reaches(self, mark: int) -> bool:
        """Return whether the state at `mark` can be restored."""
        return self._first <= mark <= self.mark

    def since(self, mark: int) -> Iterator[Step]:
        """Yield the changes since `mark` that are still recorded, oldest first."""
        for number, step in enumerate(self._steps, self._first):
            if number >= mark:
                yield step

    def begin_turn(self) -> None:
        """Start a turn at the next token.

        The turn is only ever undone as a whole, so its own tokens need not be recorded when it evicts them.
        """
        self._own_from = self._cache.ledger.next_index

    def before_cut(self, at: int, dropped: tuple[Run, ...]) -> None:
        """Record the eviction of the tokens `dropped` from slot `at` on. Call it before the eviction."""
        stop = self._stop
        older = sum(min(last, stop) - first for first, last in dropped if first < stop)
        front = min(at, self._cache.ledger.slot_from(stop))
        layers, form = self._cache.streaming_layers, self._cache.form
        step = self._record(lambda: CutStep(at, dropped, save_cut(layers, at, older, front), older, form))
        if self.on_evicted is not None:
            own = [(max(first, stop), last) for first, last in dropped if last > stop]
            self._report(step, at + older, tuple(own))
        if step is not None:
            self.report_moved(step.before, front)

    def report_moved(self, before: StateBefore, front: int, part: Part = "moved") -> None:
        """Call `on_evicted` with those of the first `front` slots that have no originals yet.

        Call it before the change.

        Args:
            before: What was saved of the slots.
            front: Number of slots.
            part: Why the slots change.
        """
        count = front - before.known
        if self.on_evicted is None or count <= 0:
            return
        runs = Ledger(list(self._cache.ledger.runs)).evict(before.known, count)
        slots = narrowed(before.moved, before.known - before.written, count)
        position = before.base + before.known
        self.on_evicted(EvictedTokens(tuple(runs), slots, CopiedStates(), position, part, self._cache.form))

    def _report(self, step: CutStep | None, at: int, own: tuple[Run, ...]) -> None:
        """Call `on_evicted` with a step's tokens, then with those of the running turn, `own`, at slot `at`."""
        assert self.on_evicted is not None
        older = None if step is None else evicted_by(step)
        if older is not None:
            self.on_evicted(older)
        if own:
            count = sum(stop - first for first, stop in own)
            try:
                before = save_cut(self._cache.streaming_layers, at, count, 0)
            except (RuntimeError, MemoryError):
                _log.warning("not enough memory to archive %d evicted tokens", count, exc_info=True)
                return
            moved = min(count, max(0, before.known - at))
            form = self._cache.form
            self.on_evicted(
                EvictedTokens(own, before.slots, before.originals, before.base + at, form=form, moved=moved)
            )

    def before_rebase(self) -> None:
        """Record a rebase. Call it before the rebase."""
        front = self._cache.ledger.slot_from(self._stop)
        step = self._record(lambda: RebaseStep(save_rebase(self._cache.streaming_layers, front), self._cache.form))
        if step is not None:
            self.report_moved(step.before, front, "rebased")

    @property
    def _stop(self) -> int:
        """Log index from which tokens need not be recorded."""
        return self._cache.ledger.next_index if self._own_from is None else self._own_from

    def _record(self, save: Callable[[], S]) -> S | None:
        try:
            step = save()
            self.add(step)
        except (RuntimeError, MemoryError):
            _log.warning("not enough memory to record a change of the cache; undo will need a prefill", exc_info=True)
            self.clear()
            return None
        return step

    def add(self, step: Step) -> None:
        """Record a change."""
        self._steps.append(step)
        self._bytes += step.nbytes
        while self._bytes > self.limit_bytes and len(self._steps) > 1:
            self._drop_oldest()

    def undo_to(self, mark: int, stop: int) -> None:
        """Undo all changes since `mark`. Layers and ledger are then as they were, up to log index `stop`.

        Args:
            mark: A mark that the history reaches.
            stop: Log index of the next token at that mark, or an earlier one. The cache must have no later tokens.
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
        """Drop all changes, so that no earlier state can be restored."""
        self._first = self.mark + 1
        self._steps.clear()
        self._bytes = 0

    def _drop_oldest(self) -> None:
        self._bytes -= self._steps.popleft().nbytes
        self._first += 1
