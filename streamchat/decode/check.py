"""Checks at load that the short path of a model computes the logits of the model's own forward pass."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.cache.layers.layer import LayerRotation, StreamingLayer
from streamchat.cache.logits import logit_distance, logits_in_pieces
from streamchat.cache.routing import routers
from streamchat.cache.token_ids import random_ids
from streamchat.decode.eager import decode_step
from streamchat.decode.families.registry import model_spec
from streamchat.decode.native_step import CompiledStep
from streamchat.quantization.linear import always_quantized

SEVERAL = (4, 3)
"""Tokens of the first calls, for a step that supports several tokens."""
TOKENS = 24
# Root mean square, in units of the logits' spread.
ALLOWED = 0.02
ALLOWED_16_BIT = 0.1
"""The default model is off by 0.07 where PyTorch emulates bfloat16; a wrong description by 0.3 or more."""
SMALL_LIMITS = {"sliding_window": 8, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0}
"""Members of a configuration or a module, and values that change the logits of so short a text."""
NOISE_FACTOR = 4.0
"""In 16 bits, the rounding of some models changes correct logits by more. They may then differ by this many times the
difference between two runs of the model's own forward pass, on the text at once and in pieces. These share some of the
rounding."""


@dataclass(frozen=True)
class StepCheck:
    """Difference between the logits of a step and of the model's own forward pass, in units of their spread."""

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the step may be used."""
        return math.isfinite(self.error) and self.error <= self.allowed


@torch.inference_mode()
def check_step(model: Any) -> StepCheck:
    """Compare the installed step of `model` (on a CPU) with its own forward pass, on a short random text.

    Both use the quantized weights if there are any. The text is shorter than the sliding windows of most models, and
    their soft caps hardly change its logits, so a model that has them is read and compared again with smaller ones.
    """
    found = _compare(model, model.forward.step)
    with _small_limits(model) as are_changed:
        spec = model_spec(model) if are_changed and found.passed else None
        if spec is not None:
            found = max(found, _compare(model, decode_step(spec)), key=lambda each: each.error / each.allowed)
    return found


@contextmanager
def _small_limits(model: Any) -> Iterator[bool]:
    """Context manager: reduce sliding windows and soft caps; yields whether there were any."""
    text_config = model.config.get_text_config()
    changed: list[tuple[Any, str, Any]] = []
    for owner in (model.config, text_config, *model.modules()):
        for name, small in SMALL_LIMITS.items():
            value = getattr(owner, name, None)
            if isinstance(value, int | float) and value > small:
                changed.append((owner, name, value))
                setattr(owner, name, small)
    try:
        yield bool(changed)
    finally:
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)


def _compare(model: Any, step: Any) -> StepCheck:
    """Return the difference between `step` and the forward pass of `model`."""
    plain = model.forward.__wrapped__
    several = SEVERAL if isinstance(step, CompiledStep) else ()
    sizes = [*several, *[1] * (TOKENS - sum(several))]
    ids = random_ids(model, TOKENS, seed=12)
    layers = [StreamingLayer(2 * TOKENS, LayerRotation()) for _ in DynamicCache(config=model.config).layers]
    found, at = [], 0
    for size in sizes:
        positions = torch.arange(at, at + size)[None]
        more = {"last_only": False} if isinstance(step, CompiledStep) else {}
        found.append(step(ids[:, at : at + size], positions, layers, **more)[0].float())
        at += size
    with always_quantized(model):
        whole = plain(input_ids=ids, use_cache=False).logits[0]
        distance = _distance_of_most if routers(model) else logit_distance
        error, allowed = distance(torch.cat(found), whole), ALLOWED
        if model.dtype != torch.float32:
            allowed = ALLOWED_16_BIT
            if error > allowed:
                pieces = torch.cat(logits_in_pieces(model, plain, ids, sizes))
                allowed = max(allowed, NOISE_FACTOR * distance(pieces, whole))
    return StepCheck(error, allowed)


def _distance_of_most(found: Tensor, expected: Tensor) -> float:
    """Return the median distance of a token's logits: rounding gives some tokens other experts."""
    pairs = zip(found, expected, strict=True)
    return statistics.median(logit_distance(ours, theirs) for ours, theirs in pairs)
