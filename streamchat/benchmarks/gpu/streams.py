"""The streams that `bench --gpu` times: streamchat's own, and transformers' `generate` with two kinds of cache."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, StaticCache

from streamchat.base.eviction_policies import DEFAULT_POLICY
from streamchat.benchmarks.gpu.cases import OURS
from streamchat.benchmarks.methods.growing import Dense
from streamchat.benchmarks.methods.registry import Method, make_method
from streamchat.benchmarks.methods.stream import ModelStream
from streamchat.benchmarks.methods.streaming import Chat
from streamchat.cache.positions.fit import PositionFit


class Static(Dense):
    """`model.generate` with a static cache, whose forward transformers compiles on a GPU."""

    room = 0
    """Tokens that the cache has room for; set it before `start`."""

    def begin(self) -> DynamicCache:
        super().begin()
        cache: Any = StaticCache(config=self.model.config, max_cache_len=self.room)
        return cache  # type: ignore[no-any-return] # `generate` takes either


def open_case(
    kind: str,
    model: Any,
    fit: PositionFit,
    *,
    cache_size: int,
    num_sink_tokens: int = 4,
    evict: str = DEFAULT_POLICY,
    room: int,
) -> ModelStream:
    """Return the stream of a kind; `room` is the number of tokens that a static cache gets."""
    if kind in OURS:
        ours = Chat(make_method("streamchat", cache_size, num_sink_tokens), model, fit)
        ours.evict = evict
        return ours
    if kind == "generate":
        return Dense(Method("dense"), model, fit)
    static = Static(Method("dense"), model, fit)
    static.room = room
    return static
