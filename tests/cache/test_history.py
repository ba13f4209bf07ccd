"""Changes of a cache are undone to the bit, without a forward pass, for every family whose layers can be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import streamchat.cache.history as histories
from tests.support.cache_streams import CUT, DTYPES, SMOKE, Stream, dtypes_of, policies_of
from tests.support.families import FAMILIES
from tests.support.family_runs import BUDGET, subject


def families() -> list[Any]:
    marks = {True: pytest.mark.smoke, False: pytest.mark.slow}
    return [
        pytest.param(name, kv, marks=marks[name in SMOKE])
        for name in CUT
        for kv in (DTYPES if name in SMOKE else dtypes_of(name))
        if kv != "k8v4" or name == "llama"
    ]


@pytest.mark.parametrize(("name", "kv"), families())
def test_each_of_the_last_turns_is_restored_to_the_bit(name: str, kv: str) -> None:
    it = subject(name, FAMILIES[name].attentions[0])
    for policy, seed in policies_of(name, kv):
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
