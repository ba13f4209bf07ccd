"""Changes of a cache are undone to the bit, without a forward pass, for every family whose layers can be cut."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import streamchat.cache.history as histories
from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.history import CacheHistory, evicted_by
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.codes import INT4, K8V4, CacheDtype
from streamchat.cache.paging import missing_runs, page_in
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.streaming import StreamingCache
from tests.support.families import FAMILIES, SERVED, text
from tests.support.family_runs import BUDGET, SINKS, Subject, subject
from tests.support.family_settings import HYBRID

SMOKE = {"llama", "gpt_neox", "deepseek_v3", "bloom"}
STATES = {"jamba", *(family.name for family in HYBRID)}
CUT = [name for name in SERVED if FAMILIES[name].served != "recompute" and name not in STATES]


DTYPES: dict[str, CacheDtype | None] = {"native": None, "int8": torch.int8, "k8v4": K8V4, "int4": INT4}


def families() -> list[Any]:
    marks = {True: pytest.mark.smoke, False: pytest.mark.slow}
    return [
        pytest.param(name, kv, marks=marks[name in SMOKE])
        for name in CUT
        for kv in DTYPES
        if kv != "k8v4" or name == "llama"
    ]


@dataclass(frozen=True)
class Moment:
    """A cache and its history at the start of a turn."""

    mark: int
    stop: int
    saved: checkpoint.CacheCheckpoint

    def must_be(self, cache: StreamingCache) -> None:
        """All tensors, also the float32 copies of what has moved, and the positions."""
        now = checkpoint.capture(cache)
        assert now.runs == self.saved.runs
        assert now.bases == self.saved.bases
        assert now.tensors.keys() == self.saved.tensors.keys()
        for name, tensor in self.saved.tensors.items():
            assert torch.equal(now.tensors[name], tensor), name


class Stream:
    """Feeds random chunks, and evicts as turns, pins and rebases make it."""

    def __init__(self, it: Subject, policy: str, seed: int, dtype: CacheDtype | None = None) -> None:
        options = EvictionOptions(policy=policy)
        self.cache = make_cache(
            it.model, it.fit, cache_size=BUDGET, num_sink_tokens=SINKS, dtype=dtype, options=options
        )
        self.cache.history = self.history = CacheHistory(self.cache)
        self.model, self.random = it.model, random.Random(seed)
        self.ids = text(4000, seed=seed)
        self.moments: list[Moment] = []

    def begin(self) -> None:
        self.moments.append(Moment(self.history.mark, self.cache.ledger.next_index, checkpoint.capture(self.cache)))
        self.history.begin_turn()

    def feed(self, count: int) -> Tensor:
        at = self.cache.ledger.next_index
        with StreamingHook(self.model, self.cache), torch.inference_mode():
            ids = self.ids[:, at : at + count]
            logits: Tensor = self.model(
                input_ids=ids, use_cache=True, **{cache_keyword(self.model): self.cache}
            ).logits[0]
        return logits

    def turn(self) -> None:
        self.begin()
        self.cache.begin_turn(self.random.randint(1, 8), self.random.randint(0, 8))
        for _ in range(self.random.randint(1, 5)):
            self.feed(self.random.randint(1, 6))
        if self.random.random() < 0.2:  # one cached turn is retained from now on
            first = self.random.choice(list(self.cache.ledger)[SINKS:-6])
            self.cache.pins = ()
            self.cache.pin(first, first + 4)

    def page_in(self) -> int:
        """Put some evicted tokens back among the others, and pin them sometimes; return how many."""
        kept = [tokens for step in self.history.since(0) if (tokens := evicted_by(step)) is not None]
        missing = missing_runs(self.cache, [run for tokens in kept for run in tokens.runs])
        if not missing:
            return 0
        first, stop = self.random.choice(missing)
        stop = min(stop, first + self.random.randint(1, 6))
        self.cache.pins = ()
        if self.random.random() < 0.5:
            self.cache.pin(first, stop)
        self.cache.make_room(stop - first)
        return page_in(self.cache, kept, [(first, stop)])

    def undo(self, moment: Moment) -> None:
        self.cache.crop_from(moment.stop)
        self.history.undo_to(moment.mark, moment.stop)


@pytest.mark.parametrize(("name", "kv"), families())
def test_each_of_the_last_turns_is_restored_to_the_bit(name: str, kv: str) -> None:
    it = subject(name, FAMILIES[name].attentions[0])
    for policy, seed in (("oldest-tokens", 1), ("key-diversity", 2)):
        stream = Stream(it, policy, seed, DTYPES[kv])
        if it.fit.method != "no positions":
            stream.cache.position_limit = min(stream.cache.position_limit, 2 * BUDGET)
        for _ in range(24):
            stream.turn()
        assert stream.cache.compression_count > 15
        pending = stream.moments[1:]
        while pending:
            # one turn back, then further ones at once
            moment = pending[-min(len(pending), stream.random.choice([1, 1, 2, 5]))]
            del pending[pending.index(moment) :]
            stream.undo(moment)
            moment.must_be(stream.cache)


@pytest.mark.parametrize(("name", "kv"), families())
def test_turns_between_which_tokens_were_paged_in_are_restored_to_the_bit(name: str, kv: str) -> None:
    it = subject(name, FAMILIES[name].attentions[0])
    stream, paged = Stream(it, "oldest-tokens", 7, DTYPES[kv]), 0
    if it.fit.method != "no positions":
        stream.cache.position_limit = min(stream.cache.position_limit, 2 * BUDGET)
    for _ in range(30):
        stream.turn()
        paged += stream.page_in() if stream.random.random() < 0.7 else 0
    assert paged > 40
    pending = stream.moments[1:]
    while pending:
        moment = pending[-min(len(pending), stream.random.choice([1, 1, 2, 5]))]
        del pending[pending.index(moment) :]
        stream.undo(moment)
        moment.must_be(stream.cache)


def test_an_undone_stream_continues_as_if_nothing_had_been_undone() -> None:
    it = subject("llama", "sdpa")
    one, other = Stream(it, "oldest-turns", 3), Stream(it, "oldest-turns", 3)
    for stream in (one, other):
        stream.cache.position_limit = 2 * BUDGET
        for _ in range(12):
            stream.turn()
    one.begin()
    one.random.setstate(other.random.getstate())
    undone = one.moments[-1]
    for _ in range(8):
        one.feed(6)
    one.undo(undone)
    for _ in range(20):
        assert torch.equal(one.feed(5), other.feed(5))


def test_the_tokens_of_a_long_turn_cost_no_memory() -> None:
    stream = Stream(subject("llama", "sdpa"), "oldest-tokens", 4)
    stream.feed(BUDGET)
    stream.begin()
    for _ in range(100):
        stream.feed(8)
    of_one_cache = sum(tensor.nbytes for tensor in stream.moments[-1].saved.tensors.values())
    assert stream.history.nbytes <= 1.5 * of_one_cache
    stream.undo(stream.moments[-1])
    stream.moments[-1].must_be(stream.cache)


def test_the_oldest_changes_are_dropped_beyond_the_limit() -> None:
    stream = Stream(subject("llama", "sdpa"), "oldest-tokens", 5)
    for _ in range(30):
        stream.turn()
    first, last = stream.moments[5], stream.moments[-2]
    stream.history.limit_bytes = stream.history.nbytes // 4
    stream.turn()
    assert stream.history.nbytes <= stream.history.limit_bytes
    assert not stream.history.reaches(first.mark)
    assert stream.history.reaches(last.mark)
    stream.undo(last)
    last.must_be(stream.cache)


def test_too_little_memory_for_the_archive_does_not_stop_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    stream, told = Stream(subject("llama", "sdpa"), "oldest-tokens", 8), list[Any]()
    stream.history.on_evicted = told.append
    stream.feed(BUDGET)
    stream.begin()
    stream.feed(8)
    count = len(told)
    assert count
    monkeypatch.setattr(histories, "save_cut", scarce)
    for _ in range(20):
        stream.feed(8)  # evicts tokens of this turn, too
    assert len(told) == count
    assert stream.cache.length <= BUDGET


def test_no_state_before_a_reset_is_restored() -> None:
    stream = Stream(subject("llama", "sdpa"), "oldest-tokens", 6)
    mark = stream.history.mark
    stream.feed(20)
    stream.cache.reset()
    assert not stream.history.reaches(mark)
    assert stream.history.reaches(stream.history.mark)
