"""Measures how a model's cached tensors carry positions. It runs the model and uses no list of families.

Two probes:

A. One forward of the same token at several positions, each with an empty cache. With a single key the softmax is 1,
so in a model with relative positions every hidden state is the same in all rows, and the tensors cached in row p must
be those of row 0, rotated by p.
B. One forward of the same token many times, without position_ids. The first block's input must not depend on the
index. This detects models that do not take position_ids and count positions themselves.

Models that do not fit are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.arguments import parameter_names
from streamchat.cache.context import context_length
from streamchat.cache.layers.kinds import device_of, kind_of, refuse_unknown_layers
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.positions.probe import (
    plain_forward,
    recorded_block_input,
    recorded_rotary_calls,
    rope_kinds,
    rotary_modules,
)
from streamchat.cache.positions.rotation import PROBE_POSITIONS, RotarySource, TensorRotation, difference
from streamchat.cache.token_ids import counting_ids, input_device, position_ids, repeated_id

# Largest rounding error, as a share of the tensor's maximum. Correct fits measure 6e-7, 1.3e-3, 1.2e-2; wrong ones
# 0.29 and more.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
INDEX_TOKENS = 24
TOKEN = 7
"""An ordinary token id."""

Method = Literal["rotation", "no positions", "recompute"]


@dataclass(frozen=True)
class PositionFit:
    """How every cached tensor of a model carries positions."""

    layers: tuple[LayerRotation, ...]
    devices: tuple[torch.device, ...]
    """Device of each cache layer; they differ if the model is sharded over several GPUs."""
    position_limit: int | None
    """First position that is treated differently (dynamic, longrope) or does not exist (tables); None = no limit."""
    error: float
    """Largest misfit, as a share of the tensor's maximum."""
    method: Method = "rotation"
    """`rotation`: rotate keys to their new positions; `no positions`: keys carry none; `recompute`: prefill the
    remaining tokens again."""
    single_steps: bool = False
    """On a cache that is not empty, several tokens in one forward give wrong logits (some recurrent models of
    transformers on a CPU)."""
    scales_queries: bool = False
    """From the limit on, attention depends on the absolute position (`absolute_limit`)."""

    @property
    def rotates(self) -> bool:
        """Whether any cached tensor carries a position."""
        return self.method == "rotation"

    @property
    def limit_reason(self) -> str:
        """The reason for the limit, to be appended to an error message; '' if there is nothing to say."""
        return " (beyond them it scales attention by the absolute position)" if self.scales_queries else ""


@torch.inference_mode()
def fit_positions(model: Any) -> PositionFit:
    """Measure how `model`, a transformers causal LM, carries positions.

    Args:
        model: In eval mode. Not changed; runs one forward of 6 tokens and one of 24.

    Raises:
        UnsupportedModelError: Its positions are not (only) rotations of cached tensors, or its cache has layers that
            cannot be evicted from.
    """
    device = input_device(model)
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    positions = torch.tensor(PROBE_POSITIONS, device=device)
    ids = repeated_id(model, (len(positions), 1), TOKEN)
    takes_positions = "position_ids" in parameter_names(model)
    with recorded_rotary_calls(model) as calls:
        cache, logits = plain_forward(model, ids, positions[:, None] if takes_positions else None)
    refuse_unknown_layers(cache)
    sources = [RotarySource(*call) for call in calls]
    layers, worst = _fit_layers(cache, sources, positions, tolerance)
    if worst > tolerance:
        raise UnsupportedModelError(
            f"the model's cached tensors are not rotated by position (misfit {worst:.2g}, allowed {tolerance:.2g}), so "
            "its positions cannot be moved"
        )
    spread = logits.std().item() or 1.0
    drift = (logits - logits[:1]).abs().max().item() / spread
    if drift > 50 * tolerance:
        raise UnsupportedModelError(
            f"the model's output depends on the absolute position (by {drift:.2g} of the logits' spread), so its "
            "positions cannot be moved"
        )
    worst = max(worst, _index_error(model, layers))
    if worst > tolerance:
        raise UnsupportedModelError(
            f"the model counts positions itself (misfit {worst:.2g}, allowed {tolerance:.2g}), so they cannot be moved"
        )
    rotates = any(layer.keys is not None or layer.values is not None for layer in layers)
    return PositionFit(
        tuple(layers),
        tuple(device_of(layer) for layer in cache.layers),
        # without positions, a table of biases may end (MPT)
        _position_limit(model) if rotates else context_length(model.config),
        worst,
        "rotation" if rotates else "no positions",
        _needs_single_steps(model, cache),
    )


def _needs_single_steps(model: Any, cache: Any) -> bool:
    """Return whether a chunk on a filled cache gives other logits than its tokens one by one (a transformers bug)."""
    if all(kind_of(layer) in ("full", "sliding") for layer in cache.layers):
        return False
    ids = counting_ids(model, 12, TOKEN)
    at_once, _ = plain_forward(model, ids[:, :8], None)
    one_by_one, _ = plain_forward(model, ids[:, :8], None)
    _, chunk = plain_forward(model, ids[:, 8:], position_ids(model, 8, 4), at_once)
    for i in range(8, 12):
        _, single = plain_forward(model, ids[:, i : i + 1], position_ids(model, i, 1), one_by_one)
    spread = chunk.std().item() or 1.0
    return (chunk[:, -1] - single[:, -1]).abs().max().item() / spread > 50 * TOLERANCE.get(model.dtype, 3e-2)


def _fit_layers(
    cache: Any, sources: list[RotarySource], positions: Tensor, tolerance: float
) -> tuple[list[LayerRotation], float]:
    layers: list[LayerRotation] = []
    worst = 0.0
    for layer in cache.layers:
        if kind_of(layer) == "recurrent":
            layers.append(LayerRotation())
            continue
        keys, keys_error = _best_rotation(layer.keys, sources, positions, tolerance)
        values, values_error = _best_rotation(layer.values, sources, positions, tolerance)
        worst = max(worst, keys_error, values_error)
        layers.append(LayerRotation(keys, values))
    return layers, worst


def _index_error(model: Any, layers: list[LayerRotation]) -> float:
    """Probe B: return how much the first block's input and the first layer's cached tensors depend on the index.

    Deeper layers are not compared: recurrent layers and learned softmax sinks make them differ legitimately.
    """
    with recorded_block_input(model) as inputs:
        cache, _ = plain_forward(model, repeated_id(model, (1, INDEX_TOKENS), TOKEN), None)
    error = _deviation(inputs[0][0], inputs[0][0][:1]) if inputs else 0.0
    layer = cache.layers[0]
    if kind_of(layer) == "recurrent" or not isinstance(layer, DynamicLayer):
        return error
    for x, rotation in ((layer.keys, layers[0].keys), (layer.values, layers[0].values)):
        assert x is not None
        count = x.shape[-2]  # a sliding layer may cache fewer
        goal = x[:, :, :1].float().expand_as(x)
        if rotation is not None:
            first = INDEX_TOKENS - count
            start = rotation.source.angles_range(first, 1, x.device)
            goal = rotation.apply(goal, difference(rotation.source.angles_range(first, count, x.device), start))
        error = max(error, _deviation(x.float(), goal))
    return error


def _deviation(x: Tensor, goal: Tensor) -> float:
    return ((x - goal).abs().max() / x.abs().max().clamp_min(1e-9)).item()


def _best_rotation(
    x: Tensor, sources: list[RotarySource], positions: Tensor, tolerance: float
) -> tuple[TensorRotation | None, float]:
    """Return the rotation that fits `x` (positions, heads, 1, dim) best, and its error; None = carries no position."""
    x = x.float()
    scale = x.abs().max().clamp_min(1e-9) if x.numel() else torch.tensor(1.0)
    if not x.numel():
        return None, 0.0
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
                    rotated = rotation.apply(x[:1].expand_as(x), (cos[:, None, None], sin[:, None, None]))
                    misfit = ((x - rotated).abs().max() / scale).item()
                    # ties (any rotation by angle 0 fits a tensor without positions) go to the simpler one
                    if misfit < error - 1e-3 * tolerance:
                        best, error = rotation, misfit
    return best, error


def _position_limit(model: nn.Module) -> int | None:
    """Return the first position that the model's rotary modules treat differently from those before it."""
    limits: list[int] = []
    for module in rotary_modules(model):
        table = getattr(module, "embed_positions", None)
        if isinstance(table, Tensor):
            limits.append(table.shape[0])
        for kind in rope_kinds(module):
            if "dynamic" in kind:
                limits.append(int(cast(Any, module).original_max_seq_len))
            if kind == "longrope":
                limits += longrope_limits(module)
    return min(limits, default=None)


def longrope_limits(module: nn.Module) -> list[int]:
    """Return the positions at which a longrope module switches to its long factors."""
    parameters: dict[str, Any] = cast(Any, module).config.rope_parameters
    # one table, or one per layer type
    tables = [parameters, *(table for table in parameters.values() if isinstance(table, dict))]
    key = "original_max_position_embeddings"
    return [int(table[key]) for table in tables if key in table]
