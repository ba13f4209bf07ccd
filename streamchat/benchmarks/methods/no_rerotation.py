"""The classic mistake: a hook crops keys and values before a forward, so new positions follow the cache's length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from streamchat.benchmarks.methods.stream import ModelStream
from streamchat.cache.arguments import given_cache


class NoRerotation(ModelStream):
    """The same tokens as with sinks and a window, but at wrong positions.

    Lengths and memory are correct, but the text degrades without any error. Sliding and recurrent layers of hybrid
    models are not changed.
    """

    def begin(self) -> DynamicCache:
        self.attach(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        return DynamicCache(config=self.model.config)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers = [
            layer
            for layer in given_cache(kwargs).layers
            if isinstance(getattr(layer, "keys", None), Tensor) and not getattr(layer, "is_sliding", False)
        ]
        room = self.method.budget - kwargs["input_ids"].shape[1]
        if not layers or layers[0].keys.dim() < 2 or layers[0].keys.shape[-2] <= room:
            return
        for layer in layers:
            layer.keys, layer.values = (cut(x, room, self.method.sinks) for x in (layer.keys, layer.values))
        self.compressions += 1


def cut(x: Tensor, size: int, sinks: int) -> Tensor:
    """Return the first `sinks` and the latest tokens of (batch, heads, tokens, head_dim), `size` in all."""
    return torch.cat([x[:, :, :sinks], x[:, :, x.shape[-2] - (size - sinks) :]], dim=-2)
