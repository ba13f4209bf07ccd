"""Runs the two classic mistakes and the correct method on the same text.

1. A forward hook that shortens `cache.key_cache[i]`: keys are not stored there, so the cache does not shrink although
   the counter grows.
2. A pre-hook that cuts the keys but lets rotary positions follow the cache's new length: lengths and memory are
   correct, but the text degrades without any error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword, given_cache
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.token_ids import as_input
from streamchat.verify.measure import layer_lengths, storage_bytes

CHUNK = 8
"""Tokens per forward, the same for all methods."""


@dataclass(frozen=True)
class PitfallResult:
    """Result of one way to handle the cache."""

    name: str
    counter: int
    """Its own count of compressions."""
    length: int
    """Length of the longest layer at the end."""
    storage_bytes: int
    perplexity: float
    """Perplexity of the tokens after the first `cache_size`."""


@dataclass
class Counter:
    """Counts the compressions of a hook."""

    value: int = 0


def run_pitfalls(
    model: Any, fit: PositionFit, ids: list[int], cache_size: int, num_sink_tokens: int
) -> list[PitfallResult]:
    """Score `ids` under each way of handling the cache.

    Args:
        model: A causal LM in eval mode, without our hooks.
        fit: Result of `choose_fit(model)`.
        ids: A text of more than `cache_size` + 8 tokens.
        cache_size: The budget of all methods but the growing cache.
        num_sink_tokens: Number of tokens at the start that no method evicts.
    """
    tokens = as_input(model, ids)

    def plain(name: str, handling: Callable[[Any, Counter], Any] | None = None) -> PitfallResult:
        cache, counter = DynamicCache(config=model.config), Counter()
        if handling is None:
            perplexity = _score(model, cache, tokens, cache_size)
        else:
            with handling(cache, counter):
                perplexity = _score(model, cache, tokens, cache_size)
        return PitfallResult(name, counter.value, max(layer_lengths(cache)), storage_bytes(cache), perplexity)

    ours = make_cache(model, fit, cache_size=cache_size, num_sink_tokens=num_sink_tokens)
    with StreamingHook(model, ours):
        perplexity = _score(model, ours, tokens, cache_size)
    streaming = PitfallResult("streamchat", ours.compression_count, max(ours.lengths), storage_bytes(ours), perplexity)
    return [
        plain("nothing evicted"),
        plain(
            "forward hook on cache.key_cache",
            lambda cache, counter: _forward_hook(model, cache, counter, cache_size, num_sink_tokens),
        ),
        plain(
            "keys cut, positions left alone",
            lambda cache, counter: cutting_pre_hook(model, counter, cache_size, num_sink_tokens),
        ),
        streaming,
    ]


@torch.inference_mode()
def _score(model: Any, cache: DynamicCache, tokens: Tensor, first: int) -> float:
    """Return the perplexity of the tokens from index `first` on, fed in chunks."""
    total, count, at = 0.0, 0, 0
    for chunk in torch.split(tokens[:, :-1], CHUNK, dim=1):
        logits = model(input_ids=chunk, use_cache=True, **{cache_keyword(model): cache}).logits[0].float()
        at += chunk.shape[1]
        targets = tokens[0, at - chunk.shape[1] + 1 : at + 1]
        scored = torch.arange(at - chunk.shape[1] + 1, at + 1, device=tokens.device) >= first
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        total += losses[scored].double().sum().item()
        count += int(scored.sum())
    return math.exp(min(total / max(count, 1), 700.0))


@contextmanager
def _forward_hook(model: nn.Module, cache: Any, counter: Counter, cache_size: int, sinks: int) -> Iterator[None]:
    """Mistake 1."""

    def shorten(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layers = [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]
        if not layers or layers[0].keys.shape[-2] <= cache_size:
            return
        # current caches do not have these lists; the assignments create attributes that nothing reads
        cache.key_cache = [_cut(layer.keys, cache_size, sinks) for layer in layers]
        cache.value_cache = [_cut(layer.values, cache_size, sinks) for layer in layers]
        counter.value += 1

    handle = model.register_forward_hook(shorten)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def cutting_pre_hook(model: nn.Module, counter: Counter, cache_size: int, sinks: int) -> Iterator[None]:
    """Mistake 2: a hook on `model` that cuts any plain cache to `cache_size`, keeping its first `sinks` tokens.

    It does not change sliding and recurrent layers of hybrid models.
    """

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layers = [
            layer
            for layer in given_cache(kwargs).layers
            if isinstance(getattr(layer, "keys", None), Tensor) and not getattr(layer, "is_sliding", False)
        ]
        room = cache_size - kwargs["input_ids"].shape[1]
        if not layers or layers[0].keys.dim() < 2 or layers[0].keys.shape[-2] <= room:
            return
        for layer in layers:
            layer.keys, layer.values = _cut(layer.keys, room, sinks), _cut(layer.values, room, sinks)
        counter.value += 1

    handle = model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _cut(x: Tensor, size: int, sinks: int) -> Tensor:
    return torch.cat([x[:, :, :sinks], x[:, :, x.shape[-2] - (size - sinks) :]], dim=-2)
