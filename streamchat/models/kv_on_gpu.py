"""Measures keys and values in 8 or 4 bits on a GPU, for `streamchat.models.kv_choice`: their loss and their speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.layers.codes import CacheDtype
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer
from streamchat.quantization.quality import divergence_from

PIECES = (32, 24)
"""Tokens per forward pass of the measured text; the second number is for the noise of the rounding."""
REPLAYS = 20
"""Steps that are timed at once: they are shorter than the pause between two of them."""


@torch.inference_mode()
def divergence_on_gpu(model: Any, ids: Tensor, dtype: CacheDtype) -> float:
    """Return the mean KL divergence of predictions with keys and values in `dtype` from those in the model's dtype.

    In nats per token, of transformers' forward pass for (1, n) `ids`. Two ways to compute the same predictions in 16
    bits round differently, which adds to the divergence. So that of a second run in the model's dtype, in pieces of
    another length, is subtracted.
    """
    native, other, again = (
        _log_probabilities(model, ids, each, size)
        for each, size in ((model.dtype, PIECES[0]), (dtype, PIECES[0]), (model.dtype, PIECES[1]))
    )
    return max(0.0, divergence_from(native, other) - divergence_from(native, again))


def _log_probabilities(model: Any, ids: Tensor, dtype: CacheDtype, size: int) -> Tensor:
    """Return log probabilities (n, vocabulary) of all predictions, float32, in main memory."""
    cache, found = cache_in(model, dtype, ids.shape[1]), []
    for piece in torch.split(ids, size, dim=1):
        logits = model(input_ids=piece, use_cache=True, **{cache_keyword(model): cache}).logits[0]
        found.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(found)


def cache_in(model: Any, dtype: CacheDtype, size: int) -> Any:
    """Return a cache of `size` tokens in `dtype`, which only transformers' forward pass uses."""
    cache: Any = DynamicCache(config=model.config)
    cache.layers = [StreamingLayer(size, LayerRotation(), dtype) for _ in cache.layers]
    return cache


@torch.inference_mode()
def relative_speed_on_gpu(model: Any, dtypes: Sequence[torch.dtype], cached: int, rounds: int) -> float:
    """Return the speed of a captured step with `cached` tokens in the second of `dtypes`, relative to the first.

    By the least time of some rounds, in turn.
    """
    runs = [timed_replays(model, dtype, cached) for dtype in dtypes]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, each in zip(runs, times, strict=True):
            each.append(run())
    return min(times[0]) / min(times[1])


@torch.inference_mode()
def timed_replays(model: Any, dtype: torch.dtype, cached: int) -> Callable[[], float]:
    """Return a function that decodes a token after `cached` others and returns the seconds that this takes.

    Args:
        model: A model with captured steps.
        dtype: Of the keys and values.
        cached: Tokens in the cache.
    """
    cache = cache_in(model, dtype, cached + 1)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=ids, use_cache=True, **{cache_keyword(model): cache})  # allocates the slots
    for layer in cache.layers:
        layer.reserve_slots(cached - 1)
    replay = model.forward.step.captured_for(cache.layers)

    def run() -> float:
        _wait(model)
        started = time.perf_counter()
        for _ in range(REPLAYS):
            replay()
        _wait(model)
        return (time.perf_counter() - started) / REPLAYS

    return run


def gpu_and_kernels(model: Any) -> str:
    """Return which GPU decodes for `model`, and with which version of Triton."""
    import triton

    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return f"{name}, Triton {triton.__version__}"


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
