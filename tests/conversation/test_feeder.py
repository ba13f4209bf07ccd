"""Padded chunks: the same logits, cache and log as plain ones, never over budget, nothing evicted for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import TokenLog
from tests.support.tiny import random_ids, tiny_model

pytestmark = pytest.mark.smoke

BUDGET = 64


def run(model: Any, padded_to: int, turns: list[int]) -> tuple[Feeder, list[torch.Tensor], list[int]]:
    """Feed turns of these sizes, and the model's view of each forward."""
    cache = StreamingCache(
        model.config, fit_positions(model), cache_size=BUDGET, options=EvictionOptions("oldest-turns", block=8)
    )
    feeder = Feeder(model, cache, TokenLog())
    feeder.padded_to = padded_to
    widths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = random_ids(sum(turns))[0].tolist()
    logits, at = [], 0
    with StreamingHook(model, cache):
        for size in turns:
            cache.begin_turn(size, reserve=8)
            logits.append(feeder.feed(ids[at : at + size]))
            at += size
            assert cache.lengths == [cache.length] * 3
            assert cache.length <= BUDGET
            assert feeder.log.ids.tolist() == ids[:at]
    handle.remove()
    return feeder, logits, widths


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_padding_changes_nothing_but_the_width_of_a_forward(family: str) -> None:
    turns = [7, 13, 3, 1, 20, 9, 15, 40, 2, 11]
    model = tiny_model(family)
    plain, expected, _ = run(model, 1, turns)
    padded, logits, widths = run(model, 8, turns)
    assert list(padded.cache.ledger) == list(plain.cache.ledger)
    assert padded.cache.compression_count == plain.cache.compression_count > 3
    for ours, theirs in zip(logits, expected, strict=True):
        assert (ours - theirs).abs().max() < 2e-5
    assert widths[:2] == [8, 16]
    assert 1 in widths  # decoding is never padded
    assert sum(width % 8 == 0 for width in widths) > len(widths) / 2


def test_a_full_cache_is_not_emptied_for_padding() -> None:
    model = tiny_model("llama")
    cache = StreamingCache(model.config, fit_positions(model), cache_size=BUDGET)
    feeder = Feeder(model, cache, TokenLog())
    feeder.padded_to = 16
    with StreamingHook(model, cache):
        for _ in range(4):
            feeder.feed(random_ids(16)[0].tolist())
        feeder.feed([5, 6, 7])
    assert cache.length == BUDGET
    assert cache.tokens_evicted == 3


def test_few_lengths_are_met_also_where_there_is_no_room_for_padding() -> None:
    """Libraries keep what they compile for each length: a full cache must not meet every one of them."""
    model = tiny_model("llama")
    ids = random_ids(400)[0].tolist()
    sizes = [9, 10, 11, 12, 13, 14, 15, 16, 17, 9, 3, 1, 14]
    found: dict[int, tuple[list[int], torch.Tensor]] = {}
    for padded_to in (1, 8):
        cache = StreamingCache(model.config, fit_positions(model), cache_size=BUDGET)
        feeder = Feeder(model, cache, TokenLog())
        feeder.padded_to = padded_to
        widths: list[int] = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=widths: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        at = 0
        logits = []
        with StreamingHook(model, cache):
            feeder.feed(ids[:16])
            for _ in range(3):
                at += 16
                feeder.feed(ids[at : at + 16])
            at += 16
            widths.clear()
            for size in sizes:
                logits.append(feeder.forward(ids[at : at + size]))
                at += size
                assert cache.length == BUDGET
        handle.remove()
        found[padded_to] = widths, torch.stack(logits)
        assert feeder.log.ids.tolist() == ids[:at]
    (plain, expected), (few, logits_too) = found[1], found[8]
    assert plain == sizes
    assert set(few) <= {8, 16, *range(1, 8)}
    torch.testing.assert_close(logits_too, expected, atol=2e-5, rtol=0)


def test_only_16_bit_models_on_a_cpu_are_padded() -> None:
    for dtype, padded_to in ((torch.float32, 1), (torch.bfloat16, 16)):
        model = tiny_model("llama").to(dtype)
        cache = StreamingCache(model.config, fit_positions(model), cache_size=BUDGET)
        assert Feeder(model, cache, TokenLog()).padded_to == padded_to


def test_a_caller_can_end_it_between_chunks() -> None:
    model = tiny_model("llama")
    cache = StreamingCache(model.config, fit_positions(model), cache_size=BUDGET)
    feeder = Feeder(model, cache, TokenLog())

    class Enough(Exception):
        pass

    seen = []

    def after_chunk(done: int) -> None:
        seen.append(done)
        if done >= 30:
            raise Enough

    with StreamingHook(model, cache), pytest.raises(Enough):
        feeder.feed(random_ids(100)[0].tolist(), after_chunk)
    assert seen == [0, 16, 31]
    assert cache.length == len(feeder.log) == 31
