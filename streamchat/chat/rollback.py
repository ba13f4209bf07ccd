"""Taking turns back: afterwards cache, ledger and token log are what they would be without them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from streamchat.cache import checkpoint
from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.cache.policy import merged_runs
from streamchat.cache.streaming import StreamingCache
from streamchat.chat.feeder import Feeder
from streamchat.chat.log import Before, TokenLog, TurnRecord
from streamchat.store.records import CacheMark

_log = logging.getLogger(__name__)
REACH = 64
"""So many of the latest turns can be taken back."""


@dataclass(frozen=True)
class TakenBack:
    """What it took."""

    restored: int = 0
    """Tokens that had been evicted since and are held again."""
    read_again: int = 0
    """Tokens that the model had to read again for that; 0 where a checkpoint had them."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says, in one of its ways, that memory is used up."""
    # On a CPU torch raises a plain RuntimeError, worded differently on each system.
    words = ("not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


class Rollback:
    """Remembers what turns need to be taken back.

    Tokens are cut from the end where nothing was evicted since. Where something was, a copy of the cache from before
    the turn's first eviction is put back: one copy is kept, in main memory, for the latest turn that evicted anything.
    Beyond that the tokens that were held are read again.
    """

    def __init__(self, cache: StreamingCache, log: TokenLog, feeder: Feeder) -> None:
        self._cache, self._log, self._feeder = cache, log, feeder
        self._running: TurnRecord | None = None
        self._copy: CacheCheckpoint | None = None
        self._copy_of: TurnRecord | None = None

    def mark(self) -> CacheMark:
        """What the cache holds now, in words."""
        cache = self._cache
        return CacheMark(tuple(cache.ledger.runs), cache.pins, tuple(cache.turn_starts), cache.compression_count)

    def begin(self, turn: TurnRecord, before: Before) -> None:
        """`turn`, the newest of the log, begins; nothing of it was announced or fed yet."""
        turn.before, self._running = before, turn
        if len(self._log.turns) > REACH:
            self._log.turns[-REACH - 1].before = None
        if not self._cache.croppable:
            self._keep_copy(turn)  # nothing can be cut from a recurrent state

    def end(self) -> None:
        """The running turn is over."""
        self._running = None

    def before_evict(self) -> None:
        """Something will be dropped from the cache."""
        if self._running is not None and self._copy_of is not self._running:
            self._keep_copy(self._running)

    def forget(self) -> None:
        """The conversation begins anew."""
        self._running = self._copy = self._copy_of = None

    def take_back(self, turn: TurnRecord) -> TakenBack:
        """Undo `turn`, the newest of the log, whether it is over or not. Pins of older turns stay as they are now."""
        before, cache = turn.before, self._cache
        assert before is not None
        assert self._log.turns[-1] is turn
        cache.discard_partial_forward()
        self._running = None
        mark = before.cache
        held_before = sum(stop - first for first, stop in mark.held)
        left = cache.ledger.count_in(0, turn.first)
        pins = tuple(merged_runs((a, min(b, turn.first)) for a, b in cache.pins if a < turn.first))
        read_again = 0
        if self._copy is not None and self._copy_of is turn:
            checkpoint.restore(cache, self._copy)
            if cache.croppable:  # the copy may have the first of the turn's own tokens
                cache.forget_from(turn.first)
            self._copy = self._copy_of = None
        elif cache.croppable and cache.compression_count == mark.compressions:
            cache.forget_from(turn.first)
        else:
            read_again = self._feeder.read_again(mark.held, turn.first)
        cache.turn_starts, cache.pins = list(mark.turn_starts), pins
        cache.compression_count = mark.compressions
        self._log.cut(turn.first)
        self._log.turns.pop()
        return TakenBack(held_before - left, read_again)

    def _keep_copy(self, turn: TurnRecord) -> None:
        self._copy = self._copy_of = None  # two at a time would be one too many
        try:
            self._copy, self._copy_of = checkpoint.take(self._cache), turn
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("no memory for a copy of the cache; undoing this turn would read it again")
