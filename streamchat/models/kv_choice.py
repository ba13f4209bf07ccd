"""Chooses how a model's keys and values are stored: in a dtype, or in 8 or 4 bits. Remembers what it measured."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from streamchat.base import paths
from streamchat.base.atomic_files import read_json, save_result
from streamchat.base.errors import describe_unexpected
from streamchat.cache.layers.codes import QUANTIZED, CacheDtype
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer
from streamchat.cache.token_ids import as_input
from streamchat.config.settings import KvDtype
from streamchat.decode.install import is_compiled, no_fused_kernels_for, uses_fused_kernels
from streamchat.kernels.build import library_path
from streamchat.models.checked_fit import code_digest
from streamchat.models.fingerprint import model_fingerprint
from streamchat.models.kv_on_gpu import divergence_on_gpu, gpu_and_kernels, relative_speed_on_gpu
from streamchat.quantization.quality import AUTO_LIMIT, TEXT, TOKENS, divergence_from

_log = logging.getLogger(__name__)

LIMIT = math.log(1.001)
"""Largest KL divergence, in nats per token, that `auto` accepts for int8: 0.1 % of perplexity if the model's own
predictions are the truth."""
SLOTS = 1024
"""Cached tokens for which speeds are compared."""
STEPS = 15
PIECE = 32
"""Tokens whose predictions are compared at once."""


def choose_kv_dtype(
    model: Any, tokenizer: Any, asked: KvDtype, native: str, *, weights: str, name: str
) -> tuple[str, tuple[str, ...]]:
    """Return the dtype for cached keys and values, and notes for the user.

    `auto` chooses int8 if compiled kernels decode, or fused ones on a GPU, and int8 was measured on this model and
    machine to cost at most 0.1 % of perplexity, and to decode as fast.

    Args:
        model: A causal LM with its step installed.
        tokenizer: For the text that the loss is measured on.
        asked: The setting.
        native: The dtype without quantization.
        weights: What the weights are: `native`, `int8`, ...
        name: Name of the model, for messages.
    """
    reads_codes = is_compiled(model) or uses_fused_kernels(model)
    if asked == "native" or (asked == "auto" and not reads_codes):
        return native, ()
    if asked in ("int4", "k8v4") and any(width % 2 for width in _head_dims(model)):
        return native, (f"kv_dtype = {asked!r} cannot be used: {name} has heads of an odd size; {native} is used",)
    wanted = QUANTIZED["int8" if asked == "auto" else asked]
    obstacle = "" if is_compiled(model) else no_fused_kernels_for(model, wanted)
    if asked == "auto" and obstacle:
        return native, ()
    if obstacle:
        return asked, (
            f"kv_dtype = {asked!r} saves memory only: {obstacle}, so {name} dequantizes the cache for every token, "
            "which is slower.",
        )
    if asked == "auto":
        return ("int8" if _suits(model, tokenizer, native, weights) else native), ()
    file = _verdict_file(model, asked, native, weights)
    loss = _remembered(file, "divergence", lambda: kv_divergence(model, tokenizer, QUANTIZED[asked]))
    return asked, _notes(asked, loss, name)


def _suits(model: Any, tokenizer: Any, native: str, weights: str) -> bool:
    """Return whether int8 costs at most 0.1 % of perplexity, and is as fast as `native`. Measured once."""
    file = _verdict_file(model, "int8", native, weights)
    try:
        loss = _remembered(file, "divergence", lambda: kv_divergence(model, tokenizer, torch.int8))
        if not loss <= LIMIT:  # also for NaN
            return False
        speed = _remembered(file, "speed", lambda: _relative_speed(model, getattr(torch, native)))
    except MemoryError:
        raise
    except Exception as error:  # whatever it is, the native dtype works
        _log.warning("keys and values in int8 could not be measured: %s", describe_unexpected(error))
        return False
    _log.info("keys and values in int8: %.5f nats/token, %.2fx as fast", loss, speed)
    return speed >= 1


def _notes(chosen: str, loss: float, name: str) -> tuple[str, ...]:
    """Return a note if `chosen` costs more than 1 % of perplexity."""
    if loss <= AUTO_LIMIT:  # false for NaN
        return ()
    return (
        f"{name} loses quality with keys and values in {chosen}: KL divergence {loss:.3f} nats/token; kv_dtype = int8 "
        "or native loses less.",
    )


def _remembered(file: Path, name: str, measure: Callable[[], float]) -> float:
    """Return the figure `name` of `file`; measure and save it if it is not there."""
    known = read_json(file)
    figure = known.get(name)
    if isinstance(figure, float):
        return figure
    figure = measure()
    if math.isfinite(figure):
        save_result(file, known | {name: figure}, "how to store keys and values")
    return figure


@torch.inference_mode()
def kv_divergence(model: Any, tokenizer: Any, dtype: CacheDtype) -> float:
    """Return the mean KL divergence of predictions with keys and values in `dtype` from those in float32.

    In nats per token. Both read a text in pieces, whose logits take little memory. Without compiled kernels, it is the
    divergence from the model's dtype, see `divergence_on_gpu`.
    """
    ids = as_input(model, tokenizer(TEXT, add_special_tokens=False)["input_ids"][:TOKENS])
    if not is_compiled(model):
        return divergence_on_gpu(model, ids, dtype)
    exact, rounded = (_layers(model, each, ids.shape[1]) for each in (torch.float32, dtype))
    total, step = 0.0, model.forward.step
    for piece in torch.split(ids, min(PIECE, step.max_tokens), dim=1):
        first, count = exact[0].length, piece.shape[1]
        positions = torch.arange(first, first + count)[None]
        plain, other = (step(piece, positions, each, last_only=False)[0].log_softmax(-1) for each in (exact, rounded))
        total += count * divergence_from(plain, other)
    return total / ids.shape[1]


@torch.inference_mode()
def _relative_speed(model: Any, native: torch.dtype) -> float:
    """Return the speed of a step with `SLOTS` tokens in int8 relative to `native`, by the least time of several.

    Processor time on one thread: other processes hardly change it. On a GPU, the time of captured steps.
    """
    if not is_compiled(model):
        return relative_speed_on_gpu(model, (native, torch.int8), SLOTS, STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = [_timed_step(model, dtype) for dtype in (native, torch.int8)]
        times: list[list[float]] = [[], []]
        for _ in range(STEPS):
            for run, each in zip(runs, times, strict=True):
                each.append(run())
    finally:
        torch.set_num_threads(threads)
    return min(times[0]) / min(times[1])


def _timed_step(model: Any, dtype: CacheDtype) -> Callable[[], float]:
    """Return a function that decodes a token after `SLOTS` others and returns the seconds of processor time."""
    layers, step = _layers(model, dtype, SLOTS + STEPS), model.forward.step
    ids, position = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), SLOTS)
    step(ids, position, layers)
    for layer in layers:
        layer.reserve_slots(SLOTS - 1)

    def run() -> float:
        started = time.thread_time()
        step(ids, position, layers)
        return time.thread_time() - started

    return run


def _layers(model: Any, dtype: CacheDtype, size: int) -> Sequence[StreamingLayer]:
    count = len(DynamicCache(config=model.config).layers)
    return [StreamingLayer(size, LayerRotation(), dtype) for _ in range(count)]


def _head_dims(model: Any) -> list[int]:
    config = model.config.get_text_config()
    dim, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", 0)
    if isinstance(dim, int):
        return [dim]
    return [config.hidden_size // heads] if heads else []


def _verdict_file(model: Any, chosen: str, native: str, weights: str) -> Path:
    """Return the file that stores the figures for this model under the current conditions."""
    conditions = {
        "kv": [chosen, native, SLOTS],
        "model": model_fingerprint(model),
        "dtype": str(model.dtype),
        "weights": weights,
        "kernels": library_path().stem if is_compiled(model) else gpu_and_kernels(model),
        "code": code_digest("streamchat.cache.layers")
        + ("" if is_compiled(model) else code_digest("streamchat.decode")),
    }
    return paths.cache_path("verdicts", json.dumps(conditions, sort_keys=True), ".json")
