"""Checkpoints of caches with recurrent layers, with learned positions, in one layer, and under inference mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig

from streamchat.cache.checkpoint import CacheCheckpoint, capture, restore
from streamchat.cache.form import new_form
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.past import PastState, rebuild
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.rotation import TensorRotation
from streamchat.cache.recompute import RecomputingCache
from streamchat.cache.streaming import StreamingCache
from tests.support.bare_cache import HEADS, WIDTH, Fed, bare_config, fed, rotary_source

CPU = torch.device("cpu")
KEYS = LayerRotation(TensorRotation(rotary_source(), 0, False))


def equal(found: CacheCheckpoint, expected: CacheCheckpoint) -> None:
    assert replace(found, tensors={}) == replace(expected, tensors={})
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def recurrent_cache(count: int) -> Any:
    """A cache of two recurrent layers around a full one, after `count` tokens."""
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    config = Qwen3NextConfig(num_hidden_layers=3, layer_types=kinds)
    fit = PositionFit((LayerRotation(), KEYS, LayerRotation()), (CPU,) * 3, None, 0.0)
    cache: Any = StreamingCache(config, fit, cache_size=16, num_sink_tokens=2)
    cache._last = 1
    for token in range(count):
        x = torch.full((1, HEADS, 1, WIDTH), float(token))
        cache.update(x, -x, 1)
        for layer in (0, 2):
            cache.layers[layer].update_conv_state(torch.full((1, 3, 2), token + 10.0 * layer))
            cache.layers[layer].update_recurrent_state(torch.full((1, 2, 2, 2), token + 20.0 * layer))
    return cache


def test_recurrent_states_are_part_of_a_checkpoint() -> None:
    cache, other = recurrent_cache(7), recurrent_cache(3)
    cache.make_room(12)
    saved = capture(cache)
    assert saved.bases == (0, cache.streaming_layers[0].base, 0) == (0, 3, 0)
    states = {name for name in saved.tensors if "state." in name}
    assert {name.split(".")[0] for name in states} == {"0", "2"}
    assert {name.split(".")[0] for name in saved.plain} == {"0", "2"}
    assert all(name.split(".")[1] == "state" for name in states)
    assert states | {"1.keys", "1.values", "1.original_keys", "1.original_values"} == saved.tensors.keys()
    restore(other, saved)
    equal(capture(other), saved)
    for layer in (0, 2):
        found, expected = other.layers[layer], cache.layers[layer]
        assert torch.equal(found.conv_states[0], expected.conv_states[0])
        assert torch.equal(found.recurrent_states[0], expected.recurrent_states[0])
        assert found.conv_states[0] is not expected.conv_states[0]
        assert found.has_previous_state[0] is True
    assert not torch.equal(other.layers[0].conv_states[0], other.layers[2].conv_states[0])
    new = recurrent_cache(0)
    restore(new, saved)
    equal(capture(new), saved)
    restore(other, capture(recurrent_cache(0)))
    assert other.layers[0].has_previous_state[0] is False


def test_tokens_and_states_of_one_layer_are_told_apart() -> None:
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["hybrid", "full_attention"])
    fit = PositionFit((KEYS, KEYS), (CPU,) * 2, None, 0.0)
    cache, other = (StreamingCache(config, fit, cache_size=16, num_sink_tokens=2) for _ in range(2))
    for layer in range(2):
        x = torch.full((1, HEADS, 3, WIDTH), 1.0 + layer)
        cache.update(x, -x, layer)
    mixed: Any = cache.layers[0]
    mixed.update_conv_state(torch.full((1, 3, 2), 5.0))
    saved = capture(cache)
    assert {name for name in saved.tensors if "state" not in name} == {"0.keys", "0.values", "1.keys", "1.values"}
    restore(other, saved)
    equal(capture(other), saved)
    again: Any = other.layers[0]
    assert torch.equal(again.conv_states[0], mixed.conv_states[0])
    assert torch.equal(again.keys, mixed.keys)


def test_checkpoints_of_equal_contents_are_equal_whatever_their_forms() -> None:
    saved = CacheCheckpoint({}, (0,), ((0, 2),), 2)
    assert (saved.pins, saved.turn_starts, saved.compressions, saved.plain, saved.stale) == ((), (), 0, {}, False)
    assert saved.form is None
    assert replace(saved, form=new_form()) == saved
    assert replace(saved, next_index=3) != saved


def recomputing(count: int, evicted: int = 0) -> Fed:
    fit = PositionFit((LayerRotation(),) * 2, (CPU,) * 2, None, 0.0, "recompute")
    it = Fed(RecomputingCache(bare_config(2), fit, cache_size=16, num_sink_tokens=2))
    it.feed(count)
    if evicted:
        it.cache.make_room(16 - count + evicted)
    return it


def test_a_cache_that_must_be_prefilled_again_is_saved_without_tensors() -> None:
    it, other = recomputing(10, 3), recomputing(4)
    saved = capture(it.cache)
    assert (saved.stale, saved.tensors, saved.runs) == (True, {}, tuple(it.cache.ledger.runs))
    restore(other.cache, saved)
    assert isinstance(other.cache, RecomputingCache)
    assert (other.cache.stale, other.cache.length, other.cache.lengths) == (True, it.cache.length, [0, 0])
    filled = capture(recomputing(10).cache)
    assert (filled.stale, filled.length) == (False, 10)
    restore(other.cache, filled)
    assert (other.cache.stale, other.cache.lengths) == (False, [10, 10])
    equal(capture(other.cache), filled)


@pytest.mark.parametrize("is_inference", [False, True])
def test_one_layer_is_saved_and_rebuilt_as_ordinary_tensors(is_inference: bool) -> None:
    it = fed(16, 2, 16, layers=1)
    it.feed(2)
    first = it.cache.streaming_layers[0]
    past = PastState(((0, 2), (4, 18)), 18, first.base, first.num_originals, it.cache.form, compressions=1)
    with torch.inference_mode(is_inference):
        saved = capture(it.cache)
        built = rebuild(it.cache, past, [])
    assert built is not None
    equal(built, saved)
    assert not any(x.is_inference() for each in (saved, built) for x in each.tensors.values())
    it.cache.reset()
    assert rebuild(it.cache, past, []) is None
    assert rebuild(fed(16, 2, 0, layers=1).cache, past, []) is None
