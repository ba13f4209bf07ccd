"""The kinds of cache layers in transformers, and what each becomes in a streaming cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import cache_utils

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.kinds import device_of, kind_of, refuse_unknown_layers
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer
from streamchat.cache.layers.select import MixedStreamingLayer, is_mixed, streaming_layer

STATES = 2
NO_TYPES: Any = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())


LAYERS: Any = cache_utils
"""Their constructors have no types."""


def mixed() -> Any:
    return LAYERS.LinearAttentionAndFullAttentionLayer(number_of_states=STATES)


def config(*types: str) -> Any:
    """A configuration whose decoder has layers of these types; its other parts have none."""
    parts = {True: SimpleNamespace(layer_types=list(types)), False: SimpleNamespace()}
    return SimpleNamespace(get_text_config=lambda decoder=False: parts[decoder])


def chosen(layer: Any, index: int = 0, configuration: Any = NO_TYPES, size: int = 8) -> Any:
    return streaming_layer(index, layer, configuration, LayerRotation(), size, torch.bfloat16)


def test_each_kind_of_layer_becomes_one_that_evicts() -> None:
    recurrent = LAYERS.LinearAttentionLayer()
    assert chosen(recurrent) is recurrent
    for layer in (LAYERS.DynamicLayer(), LAYERS.DynamicSlidingWindowLayer(sliding_window=4)):
        made = chosen(layer)
        assert type(made) is StreamingLayer
        assert (made.cache_size, is_mixed(made)) == (8, False)
        made.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
        assert made.stored_dtype == torch.bfloat16
    made = chosen(mixed())
    assert type(made) is MixedStreamingLayer
    assert (made.cache_size, is_mixed(made), made.number_of_states) == (8, True, STATES)
    with pytest.raises(UnsupportedModelError, match="layer 3 uses a SimpleNamespace, which does not support eviction"):
        chosen(SimpleNamespace(), 3)


def test_kinds_are_those_of_exact_classes() -> None:
    indexed = type("Indexed", (LAYERS.DynamicLayer,), {})  # may have additional state
    layers = [
        LAYERS.DynamicLayer(),
        LAYERS.DynamicSlidingWindowLayer(sliding_window=4),
        LAYERS.LinearAttentionLayer(),
        mixed(),
        indexed(),
    ]
    assert [kind_of(layer) for layer in layers] == ["full", "sliding", "recurrent", "mixed", "unknown"]


@pytest.mark.parametrize(
    ("types", "index", "window", "is_refused"),
    [
        (("chunked_attention", "full_attention"), 0, 7, True),
        (("chunked_attention", "full_attention"), 0, 8, False),
        (("chunked_attention", "full_attention"), 1, 7, False),
        (("chunked_attention",), 1, 7, False),
        (("sliding_attention",), 0, 7, False),
        ((), 0, 7, False),
    ],
)
def test_attention_in_chunks_needs_chunks_as_large_as_the_cache(
    types: tuple[str, ...], index: int, window: int, is_refused: bool
) -> None:
    layer = LAYERS.DynamicSlidingWindowLayer(sliding_window=window)
    if not is_refused:
        assert type(chosen(layer, index, config(*types))) is StreamingLayer
        return
    with pytest.raises(
        UnsupportedModelError,
        match=f"layer {index} attends within chunks of {window} tokens, fewer than cache_size = 8",
    ):
        chosen(layer, index, config(*types))
    assert type(chosen(LAYERS.DynamicLayer(), index, config(*types))) is StreamingLayer


def filled() -> Any:
    """A mixed layer with two rows of tokens and states."""
    layer = chosen(mixed())
    rows = torch.arange(2.0)[:, None, None, None]
    layer.update(rows.expand(2, 1, 3, 4), -rows.expand(2, 1, 3, 4))
    layer.update_conv_state(rows[:, 0].expand(2, 5, 3) + 10)
    layer.update_recurrent_state(rows.expand(2, 1, 2, 2) + 20, 1)
    return layer


def rows_of(x: Tensor) -> list[float]:
    return [float(row.flatten()[0]) for row in x]


def test_a_mixed_layer_has_tokens_and_states() -> None:
    layer = filled()
    assert (layer.length, layer.get_seq_length(), layer.stored_dtype) == (3, 3, torch.bfloat16)
    assert (rows_of(layer.keys), rows_of(layer.conv_states[0])) == ([0, 1], [10, 11])
    assert rows_of(layer.recurrent_states[1]) == [20, 21]
    assert layer.is_compileable is False
    layer.reorder_cache(torch.tensor([1, 0]))
    assert (rows_of(layer.keys), rows_of(layer.values)) == ([1, 0], [-1, 0])
    assert (rows_of(layer.conv_states[0]), rows_of(layer.recurrent_states[1])) == ([11, 10], [21, 20])
    layer.reset()
    assert (layer.length, layer.conv_states[0].any().item(), layer.has_previous_state[0]) == (0, False, False)
    layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert layer.length == 1


def test_layers_without_tokens_are_refused_if_they_are_not_recurrent() -> None:
    full, recurrent = LAYERS.DynamicLayer(), LAYERS.LinearAttentionLayer()
    full.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    recurrent.update_conv_state(torch.ones(1, 2, 3, device="meta"))
    refuse_unknown_layers(SimpleNamespace(layers=[recurrent, full]))
    assert device_of(full) == torch.device("cpu")
    assert device_of(recurrent) == torch.device("meta")
    with pytest.raises(UnsupportedModelError, match="no keys and values, so there is nothing to evict"):
        refuse_unknown_layers(SimpleNamespace(layers=[recurrent]))
    with pytest.raises(UnsupportedModelError, match="layer 1 has no keys and values"):
        refuse_unknown_layers(SimpleNamespace(layers=[full, LAYERS.DummyLayer()]))
    with pytest.raises(UnsupportedModelError, match="layer 0 of the model's cache stays empty"):
        refuse_unknown_layers(SimpleNamespace(layers=[mixed()]))
