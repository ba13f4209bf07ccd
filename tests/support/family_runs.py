"""One schedule of tokens, run through the cache and through the references; shared by the tests and the table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.fronts import evict_slots, write_fronts
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.streaming import StreamingCache
from tests.support.families import FAMILIES, build, text
from tests.support.paper_reference import PaperReference, RereadReference

BUDGET, SINKS = 32, 4
TOLERANCE = 2e-5
"""Largest logit difference that is float32 rounding; the logits' spread is 1."""


def schedule(name: str) -> list[int]:
    """Chunk sizes: a prompt that leaves room, 112 single tokens (100 of them evict), three chunks, singles."""
    chunks = [7, 7, 7] if FAMILIES[name].chunks else [1] * 21
    return [20, *[1] * 112, *chunks, *[1] * 5]


def stream(model: Any, cache: StreamingCache, ids: Tensor, sizes: list[int]) -> Tensor:
    """Feed (1, n) ids in chunks under the hook; logits (n, vocabulary)."""
    out = []
    with StreamingHook(model, cache), torch.inference_mode():
        for chunk in torch.split(ids[:, : sum(sizes)], sizes, dim=1):
            out.append(model(input_ids=chunk, use_cache=True, **{cache_keyword(model): cache}).logits[0])
    return torch.cat(out)


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return (a - b).abs().max().item()


@dataclass(frozen=True)
class Expected:
    """What the slow reference says of a family's schedule."""

    logits: Tensor
    kept: list[int]


@remembered
def expected(name: str, attention: str) -> Expected:
    """The reference, on the same attention: Falcon with alibi gives other logits on sdpa, in transformers itself."""
    model = build(name, attention)
    kind = RereadReference if FAMILIES[name].served == "recompute" else PaperReference
    reference = kind(model, BUDGET, SINKS)
    sizes = schedule(name)
    logits = [reference.feed(chunk) for chunk in torch.split(text(sum(sizes)), sizes, dim=1)]
    return Expected(torch.cat(logits), reference.kept.indices)


@dataclass(frozen=True)
class Subject:
    """A model and how the product serves it."""

    name: str
    model: Any
    fit: PositionFit

    def new_cache(self, sinks: int = SINKS) -> StreamingCache:
        """An empty one."""
        return make_cache(self.model, self.fit, cache_size=BUDGET, num_sink_tokens=sinks)

    def run(self, cache: StreamingCache) -> Tensor:
        """The schedule through `cache`; logits."""
        sizes = schedule(self.name)
        return stream(self.model, cache, text(sum(sizes)), sizes)


@remembered
def subject(name: str, attention: str) -> Subject:
    """The family's model, measured and checked as at load."""
    model = build(name, attention)
    return Subject(name, model, choose_fit(model))


def rebasing(cache: StreamingCache) -> StreamingCache:
    """The same cache, made to move its positions back every few tokens."""
    cache.position_limit = 2 * BUDGET
    return cache


def with_unmoved_sinks(cache: StreamingCache) -> StreamingCache:
    """The same cache with the classic mistake: sinks keep the rotation with which they were cached."""

    def evict(prefix: int, count: int) -> None:
        layers = cache.streaming_layers
        evict_slots(layers, prefix, count)
        base = layers[0].base
        for layer in layers:
            layer.base = 0
        write_fronts(layers, prefix)
        for layer in layers:
            layer.base = base

    cache._evict_from_layers = evict  # type: ignore[method-assign]
    return cache


def with_unturned_rebase(cache: StreamingCache) -> StreamingCache:
    """The same cache, with positions that are set back while the keys stay as they are."""

    def rebase(to: int = 0) -> None:
        for layer in cache.streaming_layers:
            layer.base = to

    cache.rebase_positions = rebase  # type: ignore[method-assign]
    return rebasing(cache)


def with_lost_sinks(cache: StreamingCache) -> StreamingCache:
    """The same cache, in which the sinks are dropped and the window is longer by as much."""

    def evict(prefix: int, count: int) -> None:
        for layer in cache.streaming_layers:
            layer.drop_slots(prefix, count)

    cache._evict_from_layers = evict  # type: ignore[method-assign]
    return cache
