"""The classic mistake: a hook crops keys and values before a forward, so new positions follow the cache's length."""

from __future__ import annotations

from transformers import DynamicCache

from streamchat.benchmarks.methods.stream import ModelStream
from streamchat.verify.pitfalls import Counter, cutting_pre_hook


class NoRerotation(ModelStream):
    """The same tokens as with sinks and a window, but at wrong positions."""

    def begin(self) -> DynamicCache:
        self.enter(cutting_pre_hook(self.model, Counter(), self.method.budget, self.method.sinks))
        return DynamicCache(config=self.model.config)
