"""Perplexity of a text under several ways to bound the cache, and a slow reference to compare them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.streaming import StreamingCache
from tests.support.reference import Reference

Feed = Callable[[Tensor], Tensor]
"""(n,) ids -> (n, vocabulary) logits, remembering what came before."""


def pieces(ids: Tensor, size: int) -> Iterator[Tensor]:
    """(n,) ids in chunks."""
    yield from torch.split(ids, size)


def perplexity(feed: Feed, ids: Tensor, chunk: int = 1) -> float:
    """exp of the mean negative log-likelihood of ids 1 .. n-1, each given what the cache holds before it."""
    total, previous = 0.0, None
    for piece in pieces(ids, chunk):
        logits = feed(piece).float().log_softmax(-1)
        rows = logits[:-1] if previous is None else torch.cat([previous, logits[:-1]])
        targets = piece[1:] if previous is None else piece
        total -= rows.gather(1, targets[:, None]).sum().item()
        previous = logits[-1:]
    return math.exp(total / (len(ids) - 1))


def full(model: Any) -> Feed:
    """A growing cache."""
    cache, name = DynamicCache(config=model.config), cache_keyword(model)

    def feed(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.as_tensor(model(input_ids=ids[None], use_cache=True, **{name: cache}).logits[0])

    return feed


class Policies:
    """Ways to keep the cache of `model` within a budget; each call starts a new stream."""

    def __init__(self, model: Any, cache_size: int, num_sink_tokens: int) -> None:
        self.model, self.cache_size, self.sinks = model, cache_size, num_sink_tokens
        self._fit = fit_positions(model)
        self._name = cache_keyword(model)

    def reference(self) -> Feed:
        """Keys kept un-rotated and rotated anew at every step, in the model's dtype."""
        return Reference(self.model, self.cache_size, self.sinks, self.model.dtype).feed

    def streaming(self, sinks: int | None = None) -> Feed:
        """The product: `StreamingCache` under its hook."""
        kept = self.sinks if sinks is None else sinks
        cache = StreamingCache(self.model.config, self._fit, cache_size=self.cache_size, num_sink_tokens=kept)

        def feed(ids: Tensor) -> Tensor:
            with StreamingHook(self.model, cache):
                return self._logits(ids, cache)

        return feed

    def without_rotation(self) -> Feed:
        """The classic mistake: keys are cut, and positions are left to the cache's new length."""
        cache = DynamicCache(config=self.model.config)

        def feed(ids: Tensor) -> Tensor:
            over = cache.get_seq_length() + len(ids) - self.cache_size
            for layer in cache.layers if over > 0 else ():
                for tensor in ("keys", "values"):
                    x = getattr(layer, tensor)
                    cut = torch.cat([x[:, :, : self.sinks], x[:, :, self.sinks + over :]], dim=2)
                    setattr(layer, tensor, cut)
            return self._logits(ids, cache)

        return feed

    def _logits(self, ids: Tensor, cache: Any) -> Tensor:
        with torch.inference_mode():
            return torch.as_tensor(self.model(input_ids=ids[None], use_cache=True, **{self._name: cache}).logits[0])
