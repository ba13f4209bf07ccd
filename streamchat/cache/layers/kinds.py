"""The kinds of cache layers in transformers, and which of them support eviction."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.recurrent import recurrent_state

Kind = Literal["full", "sliding", "recurrent", "mixed", "unknown"]
"""`full`: keys and values of all tokens; `sliding`: of the last tokens, in a window that is part of the model;
`recurrent`: a state of constant size; `mixed`: full attention and such a state in one layer."""


def _class(name: str) -> type | None:
    # some transformers versions lack these classes
    return getattr(cache_utils, name, None)


def kind_of(layer: Any) -> Kind:
    """Return the kind of a layer of a plain `DynamicCache`."""
    # Exact types: subclasses (indexed, quantized, compressed) have additional state that would be missed.
    if type(layer) is DynamicLayer:
        return "full"
    if type(layer) is DynamicSlidingWindowLayer:
        return "sliding"
    if type(layer) is _class("LinearAttentionLayer"):
        return "recurrent"
    if type(layer) is _class("LinearAttentionAndFullAttentionLayer"):
        return "mixed"
    return "unknown"


def device_of(layer: Any) -> torch.device:
    """Return the device of a filled layer of a plain `DynamicCache`, which is where the model computes that layer."""
    keys = getattr(layer, "keys", None)
    if isinstance(keys, Tensor):
        return keys.device
    return next(iter(recurrent_state(layer)[0].values())).device


def refuse_unknown_layers(cache: Any) -> None:
    """Raise UnsupportedModelError unless each layer supports eviction or has a state of constant size."""
    kinds = [kind_of(layer) for layer in cache.layers]
    for index, (layer, kind) in enumerate(zip(cache.layers, kinds, strict=True)):
        if type(layer) is _class("DummyLayer"):
            raise UnsupportedModelError(
                f"layer {index} has no keys and values (it reads those of another layer, or does not attend), which is "
                "not supported; choose a model with plain attention layers"
            )
        if kind == "unknown":
            raise UnsupportedModelError(
                f"layer {index} uses a {type(layer).__name__}, which does not support eviction; choose a model with "
                "plain attention layers"
            )
        if kind != "recurrent" and (layer.keys is None or layer.values is None):
            raise UnsupportedModelError(f"layer {index} of the model's cache stays empty, so it cannot be measured")
    if not any(kind != "recurrent" for kind in kinds):
        raise UnsupportedModelError(
            "the model has a state of constant size and no keys and values, so there is nothing to evict"
        )
