"""Evicted tokens that are paged in stand where they stood, as if they had never been evicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base.errors import CacheError
from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.policy import Cut, Run
from streamchat.cache.history import CacheHistory, evicted_by
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.codes import K8V4, CacheDtype
from streamchat.cache.layers.inserts import Originals, unrotated
from streamchat.cache.layers.slots import CopiedStates, copied, read_slots, states_in
from streamchat.cache.layers.storage import new_storage
from streamchat.cache.paging import can_page_in, missing_runs, page_in
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.sessions.evicted_pages import from_bytes, to_bytes
from tests.support.families import FAMILIES, SERVED, text
from tests.support.family_runs import BUDGET, SINKS, TOLERANCE, Subject, largest, subject
from tests.support.family_settings import HYBRID
from tests.support.reference import Reference

SMOKE = {"llama", "gpt_neox", "deepseek_v3", "bloom"}
STATES = {"jamba", *(family.name for family in HYBRID)}
CUT = [name for name in SERVED if FAMILIES[name].served != "recompute" and name not in STATES]


def families() -> list[Any]:
    return [
        pytest.param(name, attention, marks=pytest.mark.smoke if name in SMOKE else pytest.mark.slow)
        for name in CUT
        for attention in FAMILIES[name].attentions
    ]


def cache_of(it: Subject, dtype: CacheDtype | None = None) -> StreamingCache:
    cache = make_cache(it.model, it.fit, cache_size=BUDGET, num_sink_tokens=SINKS, dtype=dtype)
    cache.history = CacheHistory(cache)
    return cache


def feed(it: Subject, cache: StreamingCache, count: int) -> Tensor:
    """The next tokens of one text; their logits."""
    ids = text(400)[:, cache.ledger.next_index :][:, :count]
    with StreamingHook(it.model, cache), torch.inference_mode():
        logits: Tensor = it.model(input_ids=ids, use_cache=True, **{cache_keyword(it.model): cache}).logits[0]
    return logits


def kept(cache: StreamingCache) -> list[EvictedTokens]:
    assert cache.history is not None
    return [tokens for step in cache.history.since(0) if (tokens := evicted_by(step)) is not None]


def evict(cache: StreamingCache, *runs: Run) -> None:
    for first, stop in runs:
        cache._cut(Cut(cache.ledger.slot_from(first), stop - first))


@pytest.mark.parametrize(("name", "attention"), families())
def test_a_turn_that_is_paged_in_at_once_was_never_evicted(name: str, attention: str) -> None:
    it = subject(name, attention)
    cache, other = cache_of(it), cache_of(it)
    for each in (cache, other):
        feed(it, each, 26)
        each.pin(8, 18)
    evict(cache, (8, 11), (14, 18), (11, 14))
    assert missing_runs(cache, [(8, 18)]) == [(8, 18)]
    assert page_in(cache, kept(cache), [(8, 18)]) == 10
    assert cache.ledger.runs == other.ledger.runs == [(0, 26)]
    assert largest(feed(it, cache, 3), feed(it, other, 3)) <= TOLERANCE
    # and it goes on like one, through evictions and rebases
    if it.fit.method != "no positions":
        for each in (cache, other):
            each.position_limit = min(each.position_limit, 2 * BUDGET)
    for _ in range(14):
        assert largest(feed(it, cache, 4), feed(it, other, 4)) <= TOLERANCE
    assert cache.compression_count == other.compression_count > 10
    assert list(cache.ledger)[:14] == [*range(4), *range(8, 18)]


def states(cache: StreamingCache, first: int, stop: int) -> list[Originals]:
    """Keys and values of the tokens of some log indices, at position 0."""
    layers, slot = cache.streaming_layers, cache.ledger.slot_from(first)
    raw = copied([read_slots(layer, slot, slot + stop - first) for layer in layers])
    return unrotated(layers, raw, CopiedStates(), layers[0].base + slot, (0, stop - first))


CODES: list[tuple[CacheDtype, float]] = [(torch.int8, 0.02), (K8V4, 0.25)]


@pytest.mark.parametrize(("dtype", "error"), CODES, ids=["int8", "k8v4"])
@pytest.mark.parametrize("kind", ["native", "int8"])
@pytest.mark.parametrize(("name", "attention"), [param for param in families() if param.values[1] != "eager"])
def test_codes_are_paged_in_as_what_they_stand_for(
    name: str, attention: str, kind: Any, dtype: CacheDtype, error: float
) -> None:
    it = subject(name, attention)
    cache, other = cache_of(it, dtype), cache_of(it, dtype)
    for each in (cache, other):
        feed(it, each, 26)
        each.pin(8, 18)
    evict(cache, (8, 18))
    archived = [from_bytes(to_bytes(tokens, kind)) for tokens in kept(cache)]
    assert page_in(cache, [tokens for tokens in archived if tokens], [(8, 18)]) == 10
    assert cache.ledger.runs == other.ledger.runs
    for mine, theirs in zip(states(cache, 8, 18), states(other, 8, 18), strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert (x - y).abs().max() <= error * y.abs().max()
    for _ in range(6):
        feed(it, cache, 4)
    assert list(cache.ledger)[:14] == [*range(4), *range(8, 18)]


def test_codes_of_layers_with_heads_of_two_sizes_have_their_scales() -> None:
    states = [torch.randn(1, 2, 5, size) for size in (8, 16, 8)]
    stored = [new_storage(x, x, 5, torch.int8) for x in states]
    for storage, x in zip(stored, states, strict=True):
        storage.write(0, x, -x)
    found = states_in(copied([storage.raw(0, 5) for storage in stored]))
    assert {(name, layers) for name, layers, _ in found} == {(n, i) for n in ("keys", "values") for i in ((0, 2), (1,))}
    for name, layers, stack in found:
        for i, tensor in zip(layers, stack, strict=True):
            torch.testing.assert_close(tensor if name == "keys" else -tensor, states[i], atol=0.03, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_evictions_equal_a_reference_that_keeps_the_keys_unrotated(name: str, attention: str) -> None:
    it = subject(name, attention)
    cache, reference = cache_of(it), Reference(it.model, BUDGET, SINKS)
    cache.position_limit = 2 * BUDGET

    def step(count: int) -> None:
        ids = text(400)[0, cache.ledger.next_index :][:count]
        assert largest(feed(it, cache, count).double(), reference.feed(ids)) <= TOLERANCE
        assert list(cache.ledger) == reference.kept

    step(28)
    old = [[x[:, 8:14] for x in column] for column in (reference.keys, reference.values)]
    for _ in range(20):
        step(3)
    cache.make_room(6)
    reference.drop(SINKS, len(reference.kept) + 6 - BUDGET)
    assert page_in(cache, kept(cache), [(8, 14)]) == 6
    cache.pin(8, 14)
    for mine, theirs in zip((reference.keys, reference.values), old, strict=True):
        mine[:] = [torch.cat([x[:, :SINKS], y, x[:, SINKS:]], dim=1) for x, y in zip(mine, theirs, strict=True)]
    reference.kept[SINKS:SINKS] = range(8, 14)
    reference.sinks += 6
    for _ in range(40):
        step(3)


@pytest.mark.parametrize("dtype", [None, torch.int8, K8V4], ids=["native", "int8", "k8v4"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "deepseek_v3", "bloom"])
def test_paging_in_is_undone_to_the_bit(name: str, dtype: CacheDtype | None) -> None:
    it = subject(name, "sdpa" if FAMILIES[name].sdpa else "eager")
    cache = cache_of(it, dtype)
    assert cache.history is not None
    feed(it, cache, 30)
    for _ in range(10):
        feed(it, cache, 3)
    evict(cache, (44, 46))
    before, mark, stop = checkpoint.capture(cache), cache.history.mark, cache.ledger.next_index
    for first in (20, 8, 44):
        cache.make_room(6)
        page_in(cache, kept(cache), [(first, first + (2 if first == 44 else 6))])
    feed(it, cache, 2)
    cache.crop_from(stop)
    cache.history.undo_to(mark, stop)
    after = checkpoint.capture(cache)
    assert (after.runs, after.bases) == (before.runs, before.bases)
    assert after.tensors.keys() == before.tensors.keys()
    for path, tensor in before.tensors.items():
        assert torch.equal(after.tensors[path], tensor), path


def test_tokens_on_both_sides_of_cached_ones_are_paged_in_at_once() -> None:
    it = subject("llama", "sdpa")
    cache, other = cache_of(it), cache_of(it)
    for each in (cache, other):
        feed(it, each, 26)
    evict(cache, (8, 11), (14, 18), (20, 21))
    assert page_in(cache, kept(cache), [(8, 21)]) == 8
    assert cache.ledger.runs == [(0, 26)]
    assert largest(feed(it, cache, 3), feed(it, other, 3)) <= TOLERANCE


def test_positions_move_up_when_there_are_none_before_the_first_token() -> None:
    it = subject("llama", "sdpa")
    cache, other = cache_of(it), cache_of(it)
    for each in (cache, other):
        feed(it, each, 26)
    evict(cache, (8, 18))
    cache.rebase_positions()
    feed(it, cache, 1)
    cache.crop_newest(1)
    assert cache.streaming_layers[0].base < 10
    page_in(cache, kept(cache), [(8, 18)])
    assert cache.streaming_layers[0].base >= 0
    assert largest(feed(it, cache, 3), feed(it, other, 3)) <= TOLERANCE


def test_what_is_not_kept_or_does_not_fit_is_refused_and_nothing_changes() -> None:
    it = subject("llama", "sdpa")
    cache = cache_of(it)
    feed(it, cache, 30)
    evict(cache, (8, 18))
    tokens = kept(cache)
    feed(it, cache, 8)
    before = checkpoint.capture(cache)
    with pytest.raises(CacheError, match="10 tokens do not fit into the 4 free ones"):
        page_in(cache, tokens, [(8, 18)])
    with pytest.raises(CacheError, match="the tokens 8 to 11 are not kept"):
        page_in(cache, [], [(8, 12)])
    after = checkpoint.capture(cache)
    assert after.runs == before.runs
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    assert page_in(cache, tokens, [(0, 4), (18, 20)]) == 0  # they are cached


def test_layers_with_a_state_and_learned_positions_are_read_again() -> None:
    assert can_page_in(cache_of(subject("llama", "sdpa")))
    for name in ("gpt2", "falcon_h1"):
        it = subject(name, FAMILIES[name].attentions[0])
        assert not can_page_in(make_cache(it.model, it.fit, cache_size=BUDGET, num_sink_tokens=SINKS))
