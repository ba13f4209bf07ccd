"""Reads and restores the state of transformers' recurrent layers, independent of their attribute names.

These changed several times between 5.12 and 5.24: single tensors and flags became dictionaries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from streamchat.cache.layers.layer import LayerRotation, StreamingLayer

_OTHERS = {*vars(StreamingLayer(1, LayerRotation())), "dtype", "device", "keys", "values"}
"""Attributes of layers with keys and values that are not recurrent state, and those that follow from the tensors."""
Plain = bool | int | float | str | None


def is_recurrent(layer: Any) -> bool:
    """Return whether the layer has a state of constant size, with or without cached tokens."""
    return isinstance(layer, LinearAttentionLayer)


def recurrent_state(layer: Any) -> tuple[dict[str, Tensor], dict[str, Plain]]:
    """Return tensors and plain values of the state by path: `conv_states`, or `conv_states.0` for an entry of it."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Plain] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                visit(f"{path}.{key}", item)
        elif isinstance(value, Plain):
            plain[path] = value

    for name, value in vars(layer).items():
        if name not in _OTHERS:
            visit(name, value)
    return tensors, plain


def set_recurrent_state(layer: Any, tensors: dict[str, Tensor], plain: dict[str, Plain], device: torch.device) -> None:
    """Restore the result of `recurrent_state` in a layer of the same kind; the tensors are copied to `device`."""
    with torch.inference_mode(False):
        copies = {path: tensor.to(device, copy=True) for path, tensor in tensors.items()}
    for path, value in (plain | copies).items():
        name, _, key = path.partition(".")
        if not key:
            setattr(layer, name, value)
            continue
        container = getattr(layer, name)
        container[int(key)] = value
    if copies and hasattr(layer, "device"):
        layer.dtype, layer.device = next(iter(copies.values())).dtype, device
