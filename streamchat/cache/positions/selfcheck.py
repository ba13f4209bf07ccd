"""Numeric check when a model loads: rotates a real cache and compares it with the model's own.

The fit explains the keys of one token. This check compares the cached tensors of a whole prompt in every layer, and
the logits computed from them, which reveals a missed layer or a wrong frequency. Its forwards take 80 tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.arguments import cache_keyword, parameter_names
from streamchat.cache.layers.kinds import kind_of
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.rotation import difference
from streamchat.cache.token_ids import random_ids

PROMPT_TOKENS = 24
# one token instead of eight is too noisy in bfloat16
CHUNK_TOKENS = 8
SHIFT = 17


@dataclass(frozen=True)
class SelfCheck:
    """Result of `self_check`.

    The first three are distances of a chunk's logits from an unmoved run: root mean square, in units of their spread.
    """

    floor: float
    """All tokens moved by 17 positions by the model itself: its own shift invariance in this dtype."""
    rotated: float
    """The cache moved by our rotation; must be about `floor`."""
    control: float
    """The cache not moved: the size of a mistake on this model."""
    tensors: float
    """Largest distance, over all cached tensors, between our rotation and the model's, as a share of the distance
    moved (of the tensor's norm if it carries no position)."""
    ok: bool


@torch.inference_mode()
def self_check(model: Any, fit: PositionFit) -> SelfCheck:
    """Measure `fit` on `model` (a causal LM in eval mode; not changed)."""
    if "position_ids" not in parameter_names(model):
        # nothing can be moved, and nothing needs to be: `fit_positions` found no cached tensor with a position
        return SelfCheck(0.0, 0.0, 0.0, 0.0, not fit.rotates)
    ids = random_ids(model, PROMPT_TOKENS + CHUNK_TOKENS, seed=3)
    name = cache_keyword(model)

    def run(cache: Any, tokens: Tensor, first: int) -> Tensor:
        positions = torch.arange(first, first + tokens.shape[1], device=ids.device)[None]
        logits = model(input_ids=tokens, position_ids=positions, use_cache=True, **{name: cache}).logits
        return torch.as_tensor(logits[0]).float()

    prompt, chunk = ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]
    plain, moved = DynamicCache(config=model.config), DynamicCache(config=model.config)
    run(plain, prompt, 0)
    run(moved, prompt, SHIFT)
    rotated_cache = copy.deepcopy(plain)
    _rotate(rotated_cache, fit, SHIFT)
    tensors = _tensor_error(fit, plain, moved, rotated_cache)
    unmoved = run(copy.deepcopy(plain), chunk, PROMPT_TOKENS)
    spread = unmoved.std().clamp_min(1e-9)

    def distance(cache: Any) -> float:
        logits = run(cache, chunk, PROMPT_TOKENS + SHIFT)
        return ((logits - unmoved).square().mean().sqrt() / spread).item()

    floor, rotated, control = distance(moved), distance(rotated_cache), distance(plain)
    ok = _is_ok(floor, rotated, control, tensors, exact=model.dtype == torch.float32, rotates=fit.rotates)
    return SelfCheck(floor, rotated, control, tensors, ok)


def _is_ok(floor: float, rotated: float, control: float, tensors: float, *, exact: bool, rotates: bool) -> bool:
    """Return whether these distances are those of a right fit; `exact` in float32."""
    # in float32 a higher floor means that the output depends on the absolute position
    premise = floor < (1e-4 if rotates else 1e-5) or not exact
    agrees = rotated <= 3 * floor + 1e-5
    # In 16 bits, rounding dominates the logits of a model with random weights; only its tensors are conclusive.
    conclusive = not exact or not rotates or max(floor, rotated) <= 0.3 * control
    return premise and agrees and conclusive and tensors <= 0.3


def _tensor_error(fit: PositionFit, plain: Any, moved: Any, rotated: Any) -> float:
    worst = 0.0
    for rotations, *layers in zip(fit.layers, plain.layers, moved.layers, rotated.layers, strict=True):
        if kind_of(layers[0]) == "recurrent":
            continue
        for name, rotation in (("keys", rotations.keys), ("values", rotations.values)):
            start, goal, ours = (getattr(layer, name).float() for layer in layers)
            scale = (goal - start if rotation is not None else goal).norm().clamp_min(1e-9)
            worst = max(worst, ((ours - goal).norm() / scale).item())
    return worst


def require_self_check(model: Any, fit: PositionFit) -> SelfCheck:
    """Return the result of `self_check`; raise UnsupportedModelError with the figures if it failed."""
    result = self_check(model, fit)
    if not result.ok:
        raise UnsupportedModelError(
            "the numeric self-check of the rotary positions failed (logits moved by the model: "
            f"{result.floor:.1e}, by our rotation: {result.rotated:.1e}, not moved: {result.control:.1e}, misfit of "
            f"cached tensors: {result.tensors:.1e}); a streaming cache would give wrong output with this model"
        )
    return result


def _rotate(cache: Any, fit: PositionFit, shift: int) -> None:
    for layer, rotations in zip(cache.layers, fit.layers, strict=True):
        for name, rotation in (("keys", rotations.keys), ("values", rotations.values)):
            if rotation is None:
                continue
            x = getattr(layer, name)
            start = rotation.source.angles_range(0, x.shape[-2], x.device)
            to = rotation.source.angles_range(shift, x.shape[-2], x.device)
            setattr(layer, name, rotation.apply(x, difference(to, start)).to(x.dtype))
