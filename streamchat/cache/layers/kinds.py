"""What kinds of layers the caches of transformers have, and which of them can be evicted from."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.recurrent import recurrent_state

Kind = Literal["full", "sliding", "recurrent", "mixed", "unknown"]
"""`full`: keys and values of all tokens; `sliding`: of the latest ones, as the model was trained; `recurrent`: a state
of constant size; `mixed`: full attention and such a state in one layer."""


def _class(name: str) -> type | None:
    # transformers before 5.0 and some later ones lack these
    return getattr(cache_utils, name, None)


def kind_of(layer: Any) -> Kind:
    """The kind of a layer of a plain `DynamicCache`."""
    # Exact types: a subclass (indexed, quantised, compressed) holds other state that would be missed.
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
    """Where a filled layer of a plain `DynamicCache` keeps its tensors: where the model computes that layer."""
    keys = getattr(layer, "keys", None)
    if isinstance(keys, Tensor):
        return keys.device
    return next(iter(recurrent_state(layer)[0].values())).device


def refuse_unknown_layers(cache: Any) -> None:
    """Raise UnsupportedModelError unless each layer can be evicted from or has a state of constant size."""
    kinds = [kind_of(layer) for layer in cache.layers]
    for index, (layer, kind) in enumerate(zip(cache.layers, kinds, strict=True)):
        if type(layer) is _class("DummyLayer"):
            raise UnsupportedModelError(
                f"layer {index} has no keys and values of its own (it reads those of another layer, or does not "
                "attend), and such models are not served; models with plain attention layers can stream"
            )
        if kind == "unknown":
            raise UnsupportedModelError(
                f"layer {index} keeps a {type(layer).__name__}, which cannot be evicted from; models with plain "
                "attention layers can stream"
            )
        if kind != "recurrent" and (layer.keys is None or layer.values is None):
            raise UnsupportedModelError(f"layer {index} of the model's cache stays empty, so nothing is known of it")
    if not any(kind != "recurrent" for kind in kinds):
        raise UnsupportedModelError(
            "the model keeps a state of constant size and no keys and values, so there is nothing to evict"
        )
