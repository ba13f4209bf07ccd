"""Slow, simple references for the streaming cache. They share only its rotation.

The rotation itself is compared with the model's when it loads (`streamchat.cache.positions.selfcheck`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword, parameter_names
from streamchat.cache.layers.kinds import kind_of
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.rotation import TensorRotation, difference
from streamchat.cache.token_ids import input_device


class RerotatingReference:
    """StreamingLLM by its definition (arXiv:2309.17453, 3.2), at full cost.

    Before every forward, it drops the oldest tokens after the sinks and rotates *all* keys, from float32 copies made
    when they were cached, to positions 0 .. n-1, in a plain `DynamicCache` of transformers.

    Args:
        model: A causal LM in eval mode.
        fit: How its cached tensors carry positions; not a recompute fit.
        cache_size: The budget in tokens.
        num_sink_tokens: Number of tokens at the start that are never dropped.
    """

    def __init__(self, model: Any, fit: PositionFit, cache_size: int, num_sink_tokens: int) -> None:
        self.model, self.fit = model, fit
        self.cache_size, self.sinks = cache_size, num_sink_tokens
        self.cached: list[int] = []
        """Index in the stream of each cached token."""
        self._fed = 0
        self._cache = _RecordingCache(config=model.config)
        self._layers = [i for i, layer in enumerate(self._cache.layers) if kind_of(layer) != "recurrent"]
        self._cached_at = torch.empty(0, dtype=torch.long, device=input_device(model))
        self._originals: dict[tuple[int, str], Tensor] = {}

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> Tensor:
        """Feed (1, n) ids in one forward; returns float32 logits (n, vocabulary)."""
        count = ids.shape[1]
        self._drop(max(0, len(self.cached) + count - self.cache_size))
        length = len(self.cached)
        positions = torch.arange(length, device=ids.device)
        for index in self._layers:
            self._fill(index, positions)
        more: dict[str, Any] = {cache_keyword(self.model): self._cache}
        if "position_ids" in parameter_names(self.model):
            more["position_ids"] = torch.arange(length, length + count, device=ids.device)[None]
        logits: Tensor = self.model(input_ids=ids, use_cache=True, **more).logits[0]
        for index in self._layers:
            self._save_new(index)
        self._cached_at = torch.cat([self._cached_at, torch.arange(length, length + count, device=ids.device)])
        self.cached += range(self._fed, self._fed + count)
        self._fed += count
        return logits.float()

    def _drop(self, count: int) -> None:
        if count:
            remaining = [i for i in range(len(self.cached)) if not self.sinks <= i < self.sinks + count]
            self.cached = [self.cached[i] for i in remaining]
            self._cached_at = self._cached_at[remaining]
            self._originals = {key: x[..., remaining, :] for key, x in self._originals.items()}

    def _fill(self, index: int, positions: Tensor) -> None:
        """Fill one layer of the plain cache, with keys rotated from the positions when cached to `positions`."""
        if not len(positions):
            return
        layer: Any = self._cache.layers[index]
        sliding = kind_of(layer) == "sliding"
        for name in ("keys", "values"):
            rotation: TensorRotation | None = getattr(self.fit.layers[index], name)
            x = self._originals[index, name]
            if rotation is not None:
                to, start = rotation.source.angles(positions), rotation.source.angles(self._cached_at)
                x = rotation.apply(x, difference(to, start))
            if sliding:  # caches one token less than its window, but counts all
                x = x[..., max(0, x.shape[-2] - layer.sliding_window + 1) :, :]
            setattr(layer, name, x.to(self._cache.fresh[index][0].dtype))
        if sliding:
            layer.cumulative_length = len(positions)

    def _save_new(self, index: int) -> None:
        for name, states in zip(("keys", "values"), self._cache.fresh[index], strict=True):
            new = states.float()
            old = self._originals.get((index, name))
            self._originals[index, name] = new if old is None else torch.cat([old, new], dim=-2)


class _RecordingCache(DynamicCache):
    """Records the last states that each layer got: sliding layers do not cache all of them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.fresh: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.fresh[layer_idx] = key_states.clone(), value_states.clone()
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return result


@torch.inference_mode()
def prefill_logits(model: Any, ids: Tensor, cached: list[int], count: int) -> Tensor:
    """Return logits (count, vocabulary) of the last `count` cached tokens, from one forward of all without a cache.

    This is the reference for the recompute method, exact at and after each refill.
    """
    logits: Tensor = model(input_ids=ids[:, cached], use_cache=False).logits[0]
    return logits[-count:].float()
