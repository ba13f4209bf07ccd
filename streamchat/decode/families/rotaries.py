"""Learns how a model rotates queries and keys by calling its own functions."""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamchat.decode.families.errors import UnsupportedPartError
from streamchat.decode.spec import Rotary

_POSITION = 3
"""Position at which rotations are compared."""


@dataclass(frozen=True)
class Rotaries:
    """The angles of a model and how its heads are rotated by them."""

    calls: tuple[Rotary, ...]
    indices: dict[str, int]
    """Index in `calls` for each type of layer; empty if all layers share one."""
    interleaved: bool

    def index(self, layer_type: str | None) -> int:
        """Return the index for a layer of this type."""
        return self.indices[str(layer_type)] if self.indices else 0


def read_rotaries(model: Any) -> Rotaries:
    """Return the rotaries of `model`, one per type of layer if they differ.

    Raises:
        UnsupportedPartError: The heads are rotated in another way than by halves or neighbors.
    """
    by_type = _calls_by_type(model.base_model, model.config)
    found = [_learn(model, call) for call in by_type.values()]
    indices = {} if None in by_type else {str(kind): index for index, kind in enumerate(by_type)}
    if len({interleaved for _, interleaved in found}) != 1:
        raise UnsupportedPartError("layers rotate their heads in different ways")
    return Rotaries(tuple(call for call, _ in found), indices, found[0][1])


def _calls_by_type(body: Any, config: Any) -> dict[str | None, Rotary]:
    """Return the modules that compute angles by type of layer, or {None: module} if all layers share one."""
    several = getattr(body, "rotary_embs", None)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if several is not None:
        return {kind: several[kind] for kind in kinds}
    if "layer_type" in inspect.signature(body.rotary_emb.forward).parameters and _takes_type(body.rotary_emb):
        return {kind: functools.partial(body.rotary_emb, layer_type=kind) for kind in kinds}
    return {None: body.rotary_emb}


def _takes_type(module: Any) -> bool:
    """Return whether the module has angles per type of layer; a decorator may add the argument to any module."""
    return isinstance(getattr(module, "rope_type", None), dict)


def _learn(model: Any, call: Rotary) -> tuple[Rotary, bool]:
    """Return the rotary with its angles in the order of the heads, and whether neighbors are rotated."""
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedPartError("the model has no function that rotates queries and keys")
    device = next(model.parameters()).device
    cos, sin = call(torch.zeros(1, device=device), torch.full((1, 1), _POSITION, device=device))
    x = torch.randn(1, 1, 1, cos.shape[-1], generator=torch.Generator().manual_seed(0)).to(device)
    rotated = apply(x, x, cos, sin)[0]
    candidates = (call, False), (call, True), (functools.partial(_first_half_twice, call), True)
    for candidate, interleaved in candidates:
        angles = candidate(torch.zeros(1, device=device), torch.full((1, 1), _POSITION, device=device))
        if torch.allclose(rotated, _rotate(x, *angles, interleaved), rtol=0, atol=1e-5):
            return candidate, interleaved
    raise UnsupportedPartError("the heads are rotated in another way")


def _first_half_twice(call: Rotary, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the angles; each of the first half is repeated for two neighbors."""
    cos, sin = call(x, positions)
    half = cos.shape[-1] // 2
    return cos[..., :half].repeat_interleave(2, dim=-1), sin[..., :half].repeat_interleave(2, dim=-1)


def sines_first(call: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the angles of a module that gives one sine and one cosine per pair of neighbors, in this order."""
    sin, cos = call(x, positions)
    return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin
