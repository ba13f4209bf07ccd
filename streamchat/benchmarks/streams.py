"""Streams that feed a text to a model under one policy, chunk by chunk: ids in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.base.eviction_policies import POLICIES
from streamchat.benchmarks.policies import TURN_TOKENS, Policy
from streamchat.cache.arguments import cache_keyword, parameter_names
from streamchat.cache.context import context_length
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.verify.measure import layer_lengths, storage_bytes
from streamchat.verify.pitfalls import Counter, cutting_pre_hook

DENSE_CHUNK = 256
"""Tokens per forward if nothing is evicted; the size then affects only the speed."""


class Stream(Protocol):
    """One text under one policy."""

    chunk: int
    """Maximum tokens per forward."""
    limit: int | None
    """Maximum total tokens; None = unlimited."""

    def feed(self, ids: Tensor) -> Tensor:
        """Feed (n,) ids; return logits (n, vocabulary) in the model's dtype."""
        ...

    @property
    def length(self) -> int:
        """Tokens in the longest layer, read from its tensors."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        ...


@contextmanager
def open_stream(policy: Policy, model: Any, fit: PositionFit, chunk: int) -> Iterator[Stream]:
    """Open a new stream on `model`, with the policy's hook, if any, until the block exits.

    Args:
        policy: How the cache is bounded.
        model: A causal LM in eval mode, without hooks of streamchat.
        fit: `choose_fit(model)`.
        chunk: Requested tokens per forward; the stream may use fewer.
    """
    fitting = min(chunk, max(1, (policy.budget - policy.sinks) // 4))
    single = 1 if fit.single_steps else fitting
    if policy.kind == "recompute":
        yield _RecomputeStream(model, policy.budget, fitting)
    elif policy.kind == "dense":
        # a table of learned positions has a fixed length
        limit = context_length(model.config) if fit.method == "recompute" else None
        size = 1 if fit.single_steps else max(chunk, DENSE_CHUNK)
        yield _CachedStream(model, DynamicCache(config=model.config), size, limit)
    elif policy.kind == "no-rerotation":
        with cutting_pre_hook(model, Counter(), policy.budget, policy.sinks):
            yield _CachedStream(model, DynamicCache(config=model.config), single)
    else:
        options = EvictionOptions(policy.kind) if policy.kind in POLICIES else None
        cache = make_cache(model, fit, cache_size=policy.budget, num_sink_tokens=policy.sinks, options=options)
        with StreamingHook(model, cache):
            yield (_CachedStream if options is None else _StreamOfTurns)(model, cache, single)


class _CachedStream:
    """A stream with a cache, plain or streaming."""

    def __init__(self, model: Any, cache: DynamicCache, chunk: int, limit: int | None = None) -> None:
        self.chunk, self.limit = chunk, limit
        self._model, self._cache = model, cache
        self._arguments = {"use_cache": True, cache_keyword(model): cache}

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=ids[None], **self._arguments).logits[0]
        return logits

    @property
    def length(self) -> int:
        return max(layer_lengths(self._cache), default=0)

    @property
    def kv_bytes(self) -> int:
        return storage_bytes(self._cache)


class _StreamOfTurns(_CachedStream):
    """A stream whose text is cut into turns of `TURN_TOKENS`, with a streaming cache."""

    def feed(self, ids: Tensor) -> Tensor:
        cache = self._cache
        assert isinstance(cache, StreamingCache)
        first = cache.ledger.next_index
        logits = super().feed(ids)
        # up to that of the next token: a later start would look like one to a policy
        indices = range(first + 1 if first else 0, cache.ledger.next_index + 1)
        cache.turn_starts += [index for index in indices if index % TURN_TOKENS == 0]
        return logits


class _RecomputeStream:
    """The paper's sliding window with re-computation: no cache, the window is prefilled again for each chunk."""

    limit: int | None = None
    length = 0
    kv_bytes = 0

    def __init__(self, model: Any, budget: int, chunk: int) -> None:
        self.chunk = chunk
        self._model, self._budget = model, budget
        self._window = torch.empty(0, dtype=torch.long)
        self._trims = "logits_to_keep" in parameter_names(model)

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> Tensor:
        self._window = torch.cat([self._window.to(ids.device), ids])[-self._budget :]
        extra = {"logits_to_keep": len(ids)} if self._trims else {}
        logits: Tensor = self._model(input_ids=self._window[None], use_cache=False, **extra).logits[0, -len(ids) :]
        return logits
