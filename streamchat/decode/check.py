"""Checks, when a model loads, that its short path gives the logits of the model's own forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer
from streamchat.cache.token_ids import random_ids
from streamchat.decode.native_step import CompiledStep
from streamchat.quantization.linear import always_quantized

SEVERAL = (4, 3)
"""Tokens of the first calls, of a step that takes several."""
TOKENS = 24
# Root mean square, in units of the logits' spread.
ALLOWED = 0.02
ALLOWED_16_BIT = 0.1
"""The default model is off by 0.07 where PyTorch emulates bfloat16; a wrong description by 0.3 or more."""
NOISE_FACTOR = 4.0
"""In 16 bits, some models round so much that right logits differ by more: allowed is this many times what the logits of
the model's own forward differ by if the same text is fed whole and in pieces, which round alike in part."""


@dataclass(frozen=True)
class StepCheck:
    """How far the logits of a step are from those of the forward, in units of their spread."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the step may be used."""
        return math.isfinite(self.error) and self.error <= self.allowed


@torch.inference_mode()
def check_step(model: Any) -> StepCheck:
    """Compare the installed step of `model` (on a CPU) with its own forward, on a short random text.

    Both take the quantized weights if there are any. Text that a sliding window hides is not part of the check.
    """
    step, plain = model.forward.step, model.forward.__wrapped__
    several = SEVERAL if isinstance(step, CompiledStep) else ()
    sizes = [*several, *[1] * (TOKENS - sum(several))]
    ids = random_ids(model, TOKENS, seed=12)
    layers = [StreamingLayer(2 * TOKENS, LayerRotation()) for _ in range(_layer_count(model))]
    found, at = [], 0
    for size in sizes:
        positions = torch.arange(at, at + size)[None]
        more = {"last_only": False} if isinstance(step, CompiledStep) else {}
        found.append(step(ids[:, at : at + size], positions, layers, **more)[0].float())
        at += size
    with always_quantized(model):
        whole = plain(input_ids=ids, use_cache=False).logits[0].float()
        error, allowed = _distance(torch.cat(found), whole), ALLOWED
        if model.dtype != torch.float32:
            allowed = ALLOWED_16_BIT
            if error > allowed:
                allowed = max(allowed, NOISE_FACTOR * _distance(_in_pieces(model, plain, ids, sizes), whole))
    return StepCheck(error, allowed)


def _layer_count(model: Any) -> int:
    return len(DynamicCache(config=model.config).layers) or int(model.config.num_hidden_layers)


def _in_pieces(model: Any, plain: Any, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    cache = DynamicCache(config=model.config)
    pieces = torch.split(ids, list(sizes), dim=1)
    logits = [plain(input_ids=piece, use_cache=True, **{cache_keyword(model): cache}).logits[0] for piece in pieces]
    return torch.cat(logits).float()


def _distance(a: Tensor, b: Tensor) -> float:
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float((a - b).square().mean().sqrt() / b.std().clamp_min(1e-9))
