"""A rollback on a cache that only counts its tokens, without a model: notes what an undo does to it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.cache import checkpoint
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.form import Form
from streamchat.cache.recompute import RecomputingCache
from streamchat.conversation import rollback as module
from streamchat.conversation.fitting import CacheSelection
from streamchat.conversation.log import TokenLog, TurnRecord, TurnStart
from streamchat.conversation.rollback import Rollback

BEFORE = [(0, 4), (10, 30)]
"""Cached before turn 3, which starts at 30 and has tokens up to 60."""


class FakeHistory:
    """Notes what is done to it; an undo restores `earlier`."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.mark, self.limit_bytes, self.on_evicted = cache, 10, 0, None
        self.oldest, self.earlier, self.calls = 0, BEFORE, list[Any]()

    def begin_turn(self) -> None:
        self.calls.append("begin")

    def forget_before(self, change: int) -> None:
        self.calls.append(("forget", change))

    def reaches(self, change: int) -> bool:
        return change >= self.oldest

    def undo_to(self, change: int, stop: int) -> None:
        self.calls.append(("undo", change))
        self.cache.ledger = Ledger(list(self.earlier), stop)

    def clear(self) -> None:
        self.calls.append("clear")


class FakeCache:
    """Has a ledger and no tensors."""

    croppable = True
    history: Any = None
    length = property(lambda self: len(self.ledger))
    lengths: Any = property(lambda self: self.unequal or [self.length] * 2)
    num_sink_tokens, cache_size, kv_bytes = 4, 64, 1 << 40
    streaming_layers: Any = ()

    def __init__(self) -> None:
        self.ledger, self.form = Ledger(list(BEFORE), 30), Form(7, 8)
        self.pins, self.recalled, self.turn_starts, self.compression_count = ((0, 4),), (), [10, 20], 1
        self.calls, self.unequal = list[Any](), list[int]()

    def discard_partial_forward(self) -> None:
        self.calls.append("discard")

    def crop_from(self, stop: int) -> None:
        self.calls.append(("crop", stop))
        self.ledger = Ledger(self.ledger.runs_before(stop), stop)


class FakeRecomputing(FakeCache, RecomputingCache):  # type: ignore[misc]
    """A cache that prefills again after evictions."""


class FakeRecurrent(FakeCache):
    """A cache whose state cannot be cropped."""

    croppable = False


class CountedChat:
    """A rollback on a log with two turns, at 10 and 20, and what it did."""

    def __init__(self, kind: type[FakeCache], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "CacheHistory", FakeHistory)
        monkeypatch.setattr(module, "fit_to_budget", self.fit)
        monkeypatch.setattr(checkpoint, "capture", self.capture)
        monkeypatch.setattr(checkpoint, "restore", self.restore)
        cache: Any = kind()
        self.cache = cache
        self.log = TokenLog()
        self.log.append(range(30))
        self.log.turns = [TurnRecord(1, 10, 11, 15, 20), TurnRecord(2, 20, 21, 25, 30)]
        self.prefilled, self.captured, self.fitted = list[Any](), 0, list[tuple[int, int]]()
        self.errors: list[BaseException] = []
        feeder: Any = SimpleNamespace(prefill_runs=self.prefill, device="a device")
        self.undo: Any = Rollback(cache, self.log, feeder)

    def start(self, number: int = 3, **mark: Any) -> TurnRecord:
        """Start a turn of 30 tokens, which evicts the 10 oldest ones that are not retained."""
        turn = TurnRecord(number, len(self.log), len(self.log) + 1)
        self.log.turns.append(turn)
        before = TurnStart(replace(self.undo.mark(), **mark), recalled=((5, 6),))
        self.undo.start_turn(turn, before)
        self.cache.turn_starts = [20, turn.start]
        self.log.append(range(5))
        self.cache.ledger.append(5)
        self.undo.before_evict()
        self.cache.ledger.evict(4, 10)
        self.undo.before_evict()  # once is enough
        self.log.append(range(25))
        self.cache.ledger.append(25)
        return turn

    def fit(self, cache: Any, log: TokenLog, cached: Any, *, pins: Any, turn_starts: Any) -> CacheSelection:
        assert (cache, log) == (self.cache, self.log)
        return CacheSelection(self.fitted or list(cached), list(turn_starts), tuple(pins), (9,))

    def prefill(self, runs: Any, stop: int) -> int:
        self.prefilled.append((runs, stop))
        if self.errors:
            raise self.errors.pop()
        self.cache.ledger = Ledger(list(runs), stop)
        return len(self.cache.ledger)

    def capture(self, cache: Any) -> Any:
        self.captured += 1
        if self.errors:
            raise self.errors.pop()
        return SimpleNamespace(runs=tuple(cache.ledger.runs))

    def restore(self, cache: Any, copy: Any) -> None:
        cache.calls.append("restore")
        cache.ledger = Ledger(list(copy.runs), copy.runs[-1][1])
