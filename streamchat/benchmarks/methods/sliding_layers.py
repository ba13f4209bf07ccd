"""A window by transformers' own sliding-window layers, with absolute positions and without sinks."""

from __future__ import annotations

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from streamchat.benchmarks.methods.stream import ModelStream
from streamchat.cache.context import context_length


class SlidingLayers(ModelStream):
    """Caches the same tokens as `window`, but positions grow with the text, beyond the trained length."""

    def begin(self) -> DynamicCache:
        # a table of learned positions has a fixed length
        self.limit = context_length(self.model.config) if self.fit.method == "recompute" else None
        cache = DynamicCache(config=self.model.config)
        # each layer caches one token less than its window, which counts the new one
        cache.layers = [
            DynamicSlidingWindowLayer(self.method.budget) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]
        return cache
