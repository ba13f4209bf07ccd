"""The state of a recurrent layer: which attributes it has, and that it is restored from copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig

from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.layers.recurrent import is_recurrent, recurrent_state, set_recurrent_state
from streamchat.cache.layers.select import MixedStreamingLayer, is_mixed


class FakeLayer:
    """A layer with cached tokens and a state in several forms."""

    def __init__(self, value: int) -> None:
        self.keys, self.values, self._originals = torch.ones(2), torch.ones(2), None
        self.is_initialized, self.dtype, self.device = True, torch.float64, torch.device("meta")
        self.conv = torch.full((2,), float(value))
        self.states: Any = [torch.full((3,), float(value)), torch.full((3,), value + 1.0)]
        self.by_number: Any = {0: torch.full((1,), float(value)), 1: None}
        self.has_previous_state, self.steps, self.kind = bool(value), int(value), f"kind {value}"
        self.function = len


def test_the_state_has_tensors_and_plain_values_by_path() -> None:
    layer = FakeLayer(4)
    tensors, plain = recurrent_state(layer)
    assert tensors.keys() == {"conv", "states.0", "states.1", "by_number.0"}
    assert tensors["states.1"] is layer.states[1]
    assert plain == {"has_previous_state": True, "steps": 4, "kind": "kind 4", "by_number.1": None}


def test_tokens_of_a_mixed_layer_are_not_part_of_its_state() -> None:
    states = DynamicCache(config=Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"])).layers[0]
    layer: Any = MixedStreamingLayer(states, 8, LayerRotation())
    assert is_recurrent(layer)
    assert is_mixed(layer)
    others = recurrent_state(states)[1]
    for dtype in (None, torch.bfloat16, (torch.int8, torch.bfloat16)):
        layer = MixedStreamingLayer(states, 8, LayerRotation(), dtype)
        assert recurrent_state(layer) == ({}, others)
        layer.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
        layer.add_originals(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
        assert recurrent_state(layer) == ({}, others)
    assert layer.stored_dtype == (torch.int8, torch.bfloat16)


@pytest.mark.parametrize("is_inference", [True, False])
def test_a_restored_state_consists_of_normal_copies(is_inference: bool) -> None:
    saved, layer = FakeLayer(4), FakeLayer(0)
    tensors, plain = recurrent_state(saved)
    with torch.inference_mode(is_inference):
        set_recurrent_state(layer, tensors, plain, torch.device("cpu"))
    found, values = recurrent_state(layer)
    assert values == plain
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name] is not tensor
        assert not found[name].is_inference()
    assert (layer.dtype, layer.device) == (torch.float32, torch.device("cpu"))


def test_without_tensors_the_device_stays() -> None:
    layer = FakeLayer(0)
    set_recurrent_state(layer, {}, {"steps": 9}, torch.device("cpu"))
    assert (layer.steps, layer.dtype, layer.device) == (9, torch.float64, torch.device("meta"))
