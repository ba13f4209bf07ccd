"""A growing cache, and a growing history that is prefilled again at each turn: what users of transformers run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from streamchat.benchmarks.methods.stream import ModelStream
from streamchat.cache.context import context_length
from streamchat.conversation.chunk_size import PREFILL_CHUNK


class Dense(ModelStream):
    """A growing cache. Scored by plain forwards, timed with `model.generate`."""

    def begin(self) -> DynamicCache:
        self._ids: list[int] = []
        # a table of learned positions has a fixed length
        self.limit = context_length(self.model.config) if self.fit.method == "recompute" else None
        return DynamicCache(config=self.model.config)

    def fitting(self, chunk: int) -> int:
        # nothing is evicted: the size affects only the speed
        return 1 if self.fit.single_steps else max(chunk, PREFILL_CHUNK)

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        self._ids += ids
        self._generate(1)
        return self._ids.pop()

    def append(self, ids: Sequence[int], reserve: int = 0) -> None:
        # in chunks, because a long text in one forward would need memory for all of its logits
        super().prefill(ids)
        self._ids += ids

    def decode_timed(self, token: int, count: int) -> list[float]:
        self._ids.append(token)
        started = time.perf_counter()
        stamps = self._generate(count)
        return [later - earlier for earlier, later in zip([started, *stamps], stamps, strict=False)]

    def _generate(self, count: int) -> list[float]:
        """Generate `count` more ids; return the time of each, as of `perf_counter`."""
        ids = self.tensor(self._ids)[None]
        stamps = _TokenTimes()
        out: Tensor = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            stopping_criteria=StoppingCriteriaList([stamps]),
            **{self._keyword: self._cache},
        )
        self._ids = out[0].tolist()
        return stamps.at


class ReRead(Dense):
    """`model.generate` over the whole history at every turn, as `transformers chat` and most scripts do."""

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        self._cache = DynamicCache(config=self.model.config)
        return super().prefill(ids, reserve)

    def append(self, ids: Sequence[int], reserve: int = 0) -> None:
        self._ids += ids

    def decode_step(self, token: int) -> int:
        return Dense.prefill(self, [token])


class _TokenTimes(StoppingCriteria):
    """Records the time of each token of `generate`; never stops it."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Any:
        input_ids[0, -1].item()  # waits for the device
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
