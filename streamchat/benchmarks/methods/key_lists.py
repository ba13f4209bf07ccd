"""Another mistake: a forward hook that shortens `cache.key_cache`, which caches no longer use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from streamchat.benchmarks.methods.no_rerotation import cut
from streamchat.benchmarks.methods.stream import ModelStream


class KeyLists(ModelStream):
    """Evicts nothing: the cache grows, although the hook counts evictions."""

    def begin(self) -> DynamicCache:
        self.attach(self.model.register_forward_hook(self._after_forward))
        return DynamicCache(config=self.model.config)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache: Any = self._cache
        layers = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
        if not layers or layers[0].keys.shape[-2] <= self.method.budget:
            return
        # the assignments create attributes that nothing reads
        cache.key_cache = [cut(layer.keys, self.method.budget, self.method.sinks) for layer in layers]
        cache.value_cache = [cut(layer.values, self.method.budget, self.method.sinks) for layer in layers]
        self.compressions += 1
