"""Measuring how a model's cached tensors carry positions. No family names: the model itself is asked.

One forward of the same token at several positions, each with an empty cache. With a single key the softmax is 1, so
in a model with relative positions every hidden state is the same in all rows, and what is cached in row p must be
the rotation by p of what is cached in row 0. Whatever does not fit is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from streamchat.cache.arguments import cache_keyword, parameter_names
from streamchat.cache.layer import LayerRotation
from streamchat.cache.rotation import PROBE_POSITIONS, RotarySource, TensorRotation
from streamchat.errors import UnsupportedModelError

# Largest error, as a share of the tensor's maximum, that is rounding. Right fits measure 6e-7, 1.3e-3, 1.2e-2;
# wrong ones 0.29 and more.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class PositionFit:
    """How every cached tensor of a model carries positions."""

    layers: tuple[LayerRotation, ...]
    position_limit: int | None
    """Positions from here on mean something else (dynamic, longrope) or do not exist (tables); None = no limit."""
    error: float
    """Largest misfit, as a share of the tensor's maximum."""

    @property
    def rotates(self) -> bool:
        """Whether any tensor is rotated at all."""
        return any(layer.keys is not None or layer.values is not None for layer in self.layers)


@torch.inference_mode()
def fit_positions(model: Any, token: int = 7) -> PositionFit:
    """Measure `model`, a causal LM of transformers.

    Args:
        model: In eval mode. Not changed; one forward of 6 tokens and one of 24 run.
        token: Any ordinary token id.

    Raises:
        UnsupportedModelError: Its positions are not (only) rotations of cached tensors.
    """
    device = model.get_input_embeddings().weight.device
    positions = torch.tensor(PROBE_POSITIONS, device=device)
    if "position_ids" not in parameter_names(model):
        raise UnsupportedModelError("the model takes no position_ids, so its positions cannot be kept consistent")
    cache, calls, logits = _probe(model, torch.full((len(positions), 1), token, device=device), positions[:, None])
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    sources = [RotarySource(*call) for call in calls]
    layers: list[LayerRotation] = []
    worst = 0.0
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise UnsupportedModelError(
                f"layer {index} keeps a {type(layer).__name__}; models with plain attention layers can stream"
            )
        keys, keys_error = _best_rotation(layer.keys, sources, positions, tolerance)
        values, values_error = _best_rotation(layer.values, sources, positions, tolerance)
        worst = max(worst, keys_error, values_error)
        layers.append(LayerRotation(keys, values))
    if worst > tolerance:
        raise UnsupportedModelError(
            f"what the model caches is not a rotation by position (misfit {worst:.2g}, allowed {tolerance:.2g}); "
            "learned or absolute positions cannot be streamed"
        )
    spread = logits.std().item() or 1.0
    drift = (logits - logits[:1]).abs().max().item() / spread
    if drift > 50 * tolerance:
        raise UnsupportedModelError(
            f"the model's output depends on the absolute position (by {drift:.2g} of the logits' spread); learned or "
            "absolute positions cannot be streamed"
        )
    return PositionFit(tuple(layers), _position_limit(model), worst)


def _probe(model: Any, ids: Tensor, positions: Tensor) -> tuple[Any, list[tuple[Any, Any, Any]], Tensor]:
    """Run one forward on an empty plain cache; returns cache, rotary calls and float32 logits (rows, vocabulary)."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((module, args, kwargs))

    handles = [
        module.register_forward_hook(record, with_kwargs=True)
        for module in model.modules()
        if "rotary" in type(module).__name__.lower()
    ]
    cache = DynamicCache(config=model.config)
    try:
        out = model(input_ids=ids, position_ids=positions, use_cache=True, **{cache_keyword(model): cache})
    finally:
        for handle in handles:
            handle.remove()
    return cache, calls, out.logits[:, -1].float()


def _best_rotation(
    x: Tensor, sources: list[RotarySource], positions: Tensor, tolerance: float
) -> tuple[TensorRotation | None, float]:
    """The hypothesis that explains `x` (positions, heads, 1, dim) best, and its error; None = carries no position."""
    x = x.float()
    scale = x.abs().max().clamp_min(1e-9)
    best: TensorRotation | None = None
    error = ((x - x[:1]).abs().max() / scale).item()
    for source in sources:
        cos, sin = source.angles(positions)
        width = 2 * cos.shape[-1]
        if width > x.shape[-1]:
            continue
        for offset in sorted({0, x.shape[-1] - width}):
            for interleaved in (False, True):
                for reverse in (False, True):
                    rotation = TensorRotation(source, offset, interleaved, reverse)
                    turned = rotation.apply(x[:1].expand_as(x), (cos[:, None, None], sin[:, None, None]))
                    misfit = ((x - turned).abs().max() / scale).item()
                    # ties (a position-free tensor fits everything with angle 0) go to the simpler one
                    if misfit < error - 1e-3 * tolerance:
                        best, error = rotation, misfit
    return best, error


def _position_limit(model: nn.Module) -> int | None:
    """The first position that the model's rotary modules treat differently from the ones before."""
    limits: list[int] = []
    for module in model.modules():
        if "rotary" not in type(module).__name__.lower():
            continue
        table = getattr(module, "embed_positions", None)
        if isinstance(table, Tensor):
            limits.append(table.shape[0])
        kinds = getattr(module, "rope_type", "")
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if "dynamic" in str(kind):
                limits.append(int(cast(Any, module).original_max_seq_len))
            if kind == "longrope":
                parameters: dict[str, Any] = cast(Any, module).config.rope_parameters
                # one table, or one per layer type
                tables = [parameters, *(table for table in parameters.values() if isinstance(table, dict))]
                key = "original_max_position_embeddings"
                limits += [int(table[key]) for table in tables if key in table]
    return min(limits, default=None)
