"""Taking turns back: afterwards cache, ledger and token log are what they would be without them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from streamchat.cache import checkpoint
from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Run
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.fitting import CacheSelection, fit_to_budget, half_of
from streamchat.conversation.log import TokenLog, TurnRecord, TurnStart
from streamchat.store.records import CacheMark

_log = logging.getLogger(__name__)
REACH = 64
"""So many of the latest turns can be taken back."""


@dataclass(frozen=True)
class UndoResult:
    """What it took."""

    restored: int = 0
    """Tokens that had been evicted since and are held again."""
    read_again: int = 0
    """Tokens that the model had to read again for that; 0 where a checkpoint had them."""
    missing: int = 0
    """Tokens that should be held again, and for which there was no memory."""
    unpinned: tuple[int, ...] = ()
    """Turns whose pins no longer fit."""


@dataclass(frozen=True)
class _Copy:
    """The cache before the first eviction of a turn."""

    turn: TurnRecord
    checkpoint: CacheCheckpoint

    @property
    def runs(self) -> list[Run]:
        """Log indices of what it has from before the turn; it may have the first tokens of the turn, too."""
        return Ledger(list(self.checkpoint.runs)).runs_before(self.turn.start)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says, in one of its ways, that memory is used up."""
    # On a CPU torch raises a plain RuntimeError, worded differently on each system.
    words = ("not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def free_memory(device: torch.device) -> None:
    """Give back what torch keeps of an accelerator's memory for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


class Rollback:
    """Remembers what turns need to be taken back.

    Tokens are cut from the end where nothing was evicted since. Where something was, a copy of the cache from before
    the turn's first eviction is put back. One copy is kept, in main memory, of the latest turn that evicted anything;
    while a turn runs there is one of that turn as well, as the older one is still needed if it fails or is stopped.
    Beyond that the tokens are read again, as many of them as fit into the budget of today.
    """

    def __init__(self, cache: StreamingCache, log: TokenLog, feeder: Feeder) -> None:
        self._cache, self._log, self._feeder = cache, log, feeder
        self._running: TurnRecord | None = None
        self._copy: _Copy | None = None
        """Of a turn that is over."""
        self._running_copy: _Copy | None = None
        self._must_copy = False
        """The running turn has no copy yet, and none was tried."""
        self._hidden = False

    def mark(self) -> CacheMark:
        """What the cache holds now, in words."""
        cache = self._cache
        return CacheMark(tuple(cache.ledger.runs), cache.pins, tuple(cache.turn_starts), cache.compression_count)

    def begin(self, turn: TurnRecord, before: TurnStart) -> None:
        """`turn`, the newest of the log, begins; nothing of it was announced or fed yet."""
        turn.before, self._running, self._must_copy = before, turn, True
        if not self._cache.croppable:
            self._keep_copy(turn)  # nothing can be cut from a recurrent state

    def end(self) -> None:
        """The running turn is over and stays."""
        self._copy = self._running_copy or self._copy
        self._running = self._running_copy = None
        if len(self._log.turns) > REACH and not self._hidden:
            self._log.turns[-REACH - 1].before = None

    @contextmanager
    def hidden_turn(self) -> Iterator[None]:
        """Inside, a turn comes and is taken back: what other turns need for that stays as it is."""
        copy, self._hidden = self._copy, True
        try:
            yield
        finally:
            self._copy, self._hidden = copy, False

    def before_evict(self) -> None:
        """Something will be dropped from the cache."""
        if self._running is not None and self._must_copy:
            self._keep_copy(self._running)

    def forget(self) -> None:
        """The conversation begins anew."""
        self._running = self._copy = self._running_copy = None

    def take_back(self, turn: TurnRecord) -> UndoResult:
        """Undo `turn`, the newest of the log, whether it is over or not. Pins of older turns stay as they are now.

        Where the budget is smaller than it was before the turn, what was held then is fitted to it, as on resume.
        """
        before, cache = turn.before, self._cache
        assert before is not None
        assert self._log.turns[-1] is turn
        cache.discard_partial_forward()
        copy = self._copy_of(turn)
        self._running = self._running_copy = None
        left = Ledger(cache.ledger.runs_before(turn.start), turn.start)
        pins = Ledger(list(cache.pins)).runs_before(turn.start)
        self._log.cut(turn.start)
        self._log.turns.pop()
        mark = before.cache
        fitted = fit_to_budget(cache, self._log, mark.held, pins=pins, turn_starts=mark.turn_starts)
        read_again = self._have_back(fitted, left, copy)
        cache.turn_starts = [start for start in fitted.turn_starts if cache.ledger.count_in(start, start + 1)]
        cache.pins, cache.compression_count = fitted.pins, mark.compressions
        restored = cache.length - sum(cache.ledger.count_in(*run) for run in left.runs)
        missing = sum(stop - first for first, stop in fitted.runs) - cache.length
        return UndoResult(restored, read_again, missing, fitted.unpinned)

    def _have_back(self, fitted: CacheSelection, left: Ledger, copy: _Copy | None) -> int:
        """Make the cache hold `fitted`, in the cheapest way; returns how many tokens were read again for it.

        Args:
            fitted: What to hold.
            left: What the cache still holds of it.
            copy: From before the turn, where there is one.
        """
        cache, stop = self._cache, len(self._log)
        if copy is not None and copy.runs == fitted.runs:
            checkpoint.restore(cache, copy.checkpoint)
            if cache.croppable:
                cache.forget_from(stop)
            return 0
        if cache.croppable and left.runs == fitted.runs:
            cache.forget_from(stop)
            return 0
        return self._read_again(fitted)

    def _read_again(self, fitted: CacheSelection) -> int:
        """Prefill `fitted`; where memory runs out, less and less of it. Returns how many tokens."""
        smaller: CacheSelection | None = fitted
        while smaller is not None:
            try:
                return self._feeder.prefill_runs(smaller.runs, len(self._log))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                _log.warning("no memory to read %s again", smaller.runs)
                free_memory(self._feeder.device)
                smaller = half_of(smaller, self._cache, self._log)
        return self._cache.length

    def _copy_of(self, turn: TurnRecord) -> _Copy | None:
        """The copy for undoing `turn`; one of a turn that is over is let go of."""
        if self._running_copy is not None and self._running_copy.turn is turn:
            return self._running_copy
        copy = self._copy
        if copy is None or copy.turn is not turn:
            return None
        self._copy = None
        return copy

    def _keep_copy(self, turn: TurnRecord) -> None:
        self._must_copy = False  # later in the turn the cache is another one
        while True:
            try:
                self._running_copy = _Copy(turn, checkpoint.take(self._cache))
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._copy is None:
                    _log.warning("no memory for a copy of the cache; undoing this turn would read it again")
                    return
                self._copy = None  # the copy of an older turn has to make room
