"""Undoes turns: afterwards cache, ledger and token log are what they would be without them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from streamchat.base.out_of_memory import is_out_of_memory
from streamchat.cache import checkpoint
from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Run, runs_without
from streamchat.cache.form import Form
from streamchat.cache.history import SMALLEST_LIMIT, CacheHistory
from streamchat.cache.past import PastState, rebuild
from streamchat.cache.recompute import RecomputingCache
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.fitting import CacheSelection, fit_to_budget, half_of, unpinned_notice
from streamchat.conversation.log import TokenLog, TurnRecord, TurnStart
from streamchat.conversation.pins import pinned_turns
from streamchat.store.records import CacheMark

_log = logging.getLogger(__name__)
REACH = 64
"""Maximum undo depth, in turns."""
FindPast = Callable[[Sequence[Run], int], Sequence[EvictedTokens]]
"""(runs of log indices, generation of the cache) -> what was archived of these tokens."""


@dataclass(frozen=True)
class UndoResult:
    """What an undo restored."""

    restored: int = 0
    """Tokens that had been evicted since and are cached again."""
    read_again: int = 0
    """Tokens that had to be prefilled again for that; 0 if a checkpoint had them."""
    missing: int = 0
    """Tokens that could not be cached again for lack of memory."""
    unpinned: tuple[int, ...] = ()
    """Turns whose pins no longer fit."""
    is_exact: bool = False
    """Whether keys and values are equal to the bit to what they were before the turn."""

    def notices(self, cache: StreamingCache) -> list[str]:
        """Return sentences for the user about what could not be restored to `cache`."""
        notices = []
        if self.unpinned:
            notices.append(unpinned_notice(self.unpinned, cache.cache_size))
        if self.missing:
            notices.append(
                f"Out of memory: {self.missing:,} of {self.missing + cache.length:,} tokens could not be restored to "
                "the cache; use /clear, or resume with a smaller --cache-size"
            )
        return notices


@dataclass(frozen=True)
class _Copy:
    """The cache before the first eviction of a turn."""

    turn: TurnRecord
    checkpoint: CacheCheckpoint

    @property
    def runs(self) -> list[Run]:
        """Log indices of its tokens from before the turn; it may also have the first tokens of the turn."""
        return Ledger(list(self.checkpoint.runs)).runs_before(self.turn.start)


def release_memory(device: torch.device) -> None:
    """Release the accelerator memory that torch's allocator has cached."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class Rollback:
    """Undoes turns, and saves the state that this needs.

    The turn's tokens are cropped, and what it evicted is put back where it was: the cache records its changes, those of
    the last turns in main memory (`CacheHistory`).

    A recurrent state cannot be cropped, and a cache that prefills again after evictions has nothing to put back. There,
    a copy of the cache from before the turn's first change is restored. One copy, of the latest turn that evicted
    tokens, is kept. While a turn runs there is a second copy for it, because the older one is still needed if the turn
    fails or is stopped.

    If neither is there, the tokens are prefilled again, as many as fit into the current budget.
    """

    def __init__(self, cache: StreamingCache, log: TokenLog, feeder: Feeder) -> None:
        self._cache, self._log, self._feeder = cache, log, feeder
        if cache.croppable and not isinstance(cache, RecomputingCache):
            cache.history = CacheHistory(cache)
        self._marks: dict[int, int] = {}
        """For each turn, the number of the first change of the cache since it started."""
        self._uncopied: TurnRecord | None = None
        """The running turn, until a copy for it was made or tried."""
        self._copy: _Copy | None = None
        """The copy for a finished turn."""
        self._running_copy: _Copy | None = None
        self._hidden = False
        self.find_past: FindPast = lambda wanted, generation: ()
        """Finds archived tokens."""

    def mark(self) -> CacheMark:
        """Return a bookkeeping snapshot of the cache (no tensors)."""
        cache, base, originals = self._cache, 0, 0
        if cache.streaming_layers:
            first = cache.streaming_layers[0]  # positions and originals are the same in all layers
            base, originals = first.base, first.num_originals
        contents = (base, originals, cache.form.generation, cache.form.epoch)
        runs, starts = tuple(cache.ledger.runs), tuple(cache.turn_starts)
        return CacheMark(runs, cache.pins, starts, cache.compression_count, *contents)

    def rebuilt(self, mark: CacheMark, stop: int) -> CacheCheckpoint | None:
        """Return the cache as it was at `mark`, a stream of `stop` tokens, to the bit; None if parts are missing."""
        cache, form = self._cache, Form(mark.generation, mark.epoch)
        if cache.history is None or not mark.generation:
            return None
        past = PastState(
            mark.held, stop, mark.base, mark.originals, form, mark.pins, mark.turn_starts, mark.compressions
        )
        try:
            return rebuild(cache, past, self.find_past(mark.held, mark.generation))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("not enough memory to rebuild an earlier state of the cache")
            return None

    def start_turn(self, turn: TurnRecord, before: TurnStart) -> None:
        """Start `turn`, the newest of the log, before any of it is fed or any event is emitted."""
        turn.before = before
        history = self._cache.history
        if history is not None:
            history.begin_turn()
            history.limit_bytes = max(SMALLEST_LIMIT, 2 * self._cache.kv_bytes)
            self._marks[turn.number] = history.mark
            return
        self._uncopied = turn
        if not self._cache.croppable:
            self.before_evict()  # a recurrent state cannot be cropped

    def end_turn(self) -> None:
        """Finish the running turn, which stays in the conversation."""
        self._copy = self._running_copy or self._copy
        self._uncopied = self._running_copy = None
        if len(self._log.turns) > REACH and not self._hidden:
            self._forget(self._log.turns[-REACH - 1])

    def _forget(self, turn: TurnRecord) -> None:
        """Drop what undoing `turn`, which is too old now, needs."""
        turn.before = None
        self._marks.pop(turn.number, None)
        if self._cache.history is not None:
            self._cache.history.forget_before(self._marks.get(turn.number + 1, 0))

    @contextmanager
    def hidden_turn(self) -> Iterator[None]:
        """Keep the undo state of other turns while a turn runs and is undone inside the block."""
        copy, self._hidden = self._copy, True
        history = self._cache.history
        archive = None if history is None else history.on_evicted
        if history is not None:
            history.on_evicted = None
        try:
            yield
        finally:
            self._copy, self._hidden = copy, False
            if history is not None:
                history.on_evicted = archive

    def before_evict(self) -> None:
        """Save a copy of the cache before the first eviction of the running turn, if the cache has no history."""
        turn, self._uncopied = self._uncopied, None  # later in the turn the cache has changed
        if turn is not None:
            self._save_copy(turn)

    def clear(self) -> None:
        """Drop all copies; the conversation starts over."""
        self._uncopied = self._copy = self._running_copy = None
        self._marks.clear()
        if self._cache.history is not None:
            self._cache.history.clear()

    def undo(self, turn: TurnRecord, *, pins_of_then: bool = False) -> UndoResult:
        """Undo `turn` and all later ones, whether finished or not.

        If the budget is smaller than it was before the turn, what was cached then is cut to fit, as on resume.

        Args:
            turn: A turn whose `before` is known.
            pins_of_then: Also undo later changes of the pins of older turns.
        """
        before, cache = turn.before, self._cache
        assert before is not None
        assert self._log.turns[turn.number - 1] is turn
        cache.discard_partial_forward()
        # not if memory ran out while layers evicted
        is_whole = cache.history is None or set(cache.lengths) <= {cache.length}
        copy = self._copy_of(turn)
        self._uncopied = self._running_copy = None
        left = Ledger(cache.ledger.runs_before(turn.start), turn.start)
        mark = before.cache
        pins = list(mark.pins) if pins_of_then else self._pins_before(turn)
        first_change = self._marks.get(turn.number) if is_whole else None
        if first_change is not None and (cache.history is None or not cache.history.reaches(first_change)):
            first_change = None
        built = None
        if first_change is None and copy is None and is_whole and not self._is_same(mark, left):
            built = self.rebuilt(mark, turn.start)
        for undone in self._log.turns[turn.number - 1 :]:
            self._marks.pop(undone.number, None)
        self._log.cut(turn.start)
        del self._log.turns[turn.number - 1 :]
        fitted = fit_to_budget(cache, self._log, mark.held, pins=pins, turn_starts=mark.turn_starts)
        copy = _Copy(turn, built) if built is not None else copy
        read_again = self._restore(fitted, left, copy, first_change, is_whole)
        cache.turn_starts = [start for start in fitted.turn_starts if cache.ledger.count_in(start, start + 1)]
        cache.pins, cache.recalled, cache.compression_count = fitted.pins, before.recalled, mark.compressions
        restored = cache.length - sum(cache.ledger.count_in(*run) for run in left.runs)
        missing = sum(stop - first for first, stop in fitted.runs) - cache.length
        return UndoResult(restored, read_again, missing, fitted.unpinned, self._is_same(mark, cache.ledger))

    def _is_same(self, mark: CacheMark, left: Ledger) -> bool:
        """Return whether the cached tokens `left` are those of `mark`, and have not been moved since."""
        now = self.mark()
        contents = (now.base, now.originals, now.generation, now.epoch)
        then = (mark.base, mark.originals, mark.generation, mark.epoch)
        return left.runs == list(mark.held) and contents == then

    def _pins_before(self, turn: TurnRecord) -> list[Run]:
        """Return the pins of older turns, without those of turns that were paged in since."""
        assert turn.before is not None
        pins = Ledger(list(self._cache.pins)).runs_before(turn.start)
        held = Ledger(list(turn.before.cache.held))
        for pinned in pinned_turns(self._log, pins, self._cache.num_sink_tokens):
            first, stop = max(pinned.start, self._cache.num_sink_tokens), pinned.end or pinned.start
            if first < stop and not held.count_in(first, stop):
                pins = runs_without(pins, first, stop)
        return pins

    def _restore(
        self, fitted: CacheSelection, left: Ledger, copy: _Copy | None, first_change: int | None, is_whole: bool
    ) -> int:
        """Make `fitted` the contents of the cache, in the cheapest way; return the number of tokens prefilled.

        Args:
            fitted: The tokens to cache.
            left: Those that are still cached.
            copy: The cache before the turn, if there is a copy.
            first_change: Number of the first change of the cache since the turn started, if it is known.
            is_whole: Whether all layers have the tokens of the ledger.
        """
        cache, stop = self._cache, len(self._log)
        history = cache.history
        if history is not None and first_change is not None:
            cache.crop_from(stop)
            history.undo_to(first_change, stop)
            return 0 if cache.ledger.runs == fitted.runs else self._prefill(fitted)
        if copy is not None and copy.runs == fitted.runs:
            checkpoint.restore(cache, copy.checkpoint)
            if cache.croppable:
                cache.crop_from(stop)
            return 0
        if cache.croppable and left.runs == fitted.runs and is_whole:
            cache.crop_from(stop)
            return 0
        return self._prefill(fitted)

    def _prefill(self, fitted: CacheSelection) -> int:
        """Prefill `fitted`, or less and less of it when memory runs out; return the number of tokens."""
        smaller: CacheSelection | None = fitted
        while smaller is not None:
            try:
                return self._feeder.prefill_runs(smaller.runs, len(self._log))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                _log.warning("not enough memory to prefill %s", smaller.runs)
                release_memory(self._feeder.device)
                smaller = half_of(smaller, self._cache, self._log)
        return self._cache.length

    def _copy_of(self, turn: TurnRecord) -> _Copy | None:
        """Return the copy for undoing `turn`, or None. The copy for a finished turn is dropped here."""
        if self._running_copy is not None and self._running_copy.turn is turn:
            return self._running_copy
        copy = self._copy
        if copy is None or copy.turn.number < turn.number:
            return None
        self._copy = None  # also if it is that of a later turn, which is undone as well
        return copy if copy.turn is turn else None

    def _save_copy(self, turn: TurnRecord) -> None:
        while True:
            try:
                self._running_copy = _Copy(turn, checkpoint.capture(self._cache))
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._copy is None:
                    _log.warning("not enough memory for a copy of the cache; undoing this turn will need a prefill")
                    return
                self._copy = None  # free the older copy, then try again
