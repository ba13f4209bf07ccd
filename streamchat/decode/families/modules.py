"""Reads what a small module computes (a norm, an activation, a rotary embedding) by trying it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from streamchat.decode.spec import ACTIVATIONS, NormSpec, Rotary

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
DEFAULT_EPS = 1e-5
"""Of a norm that does not name its own (OLMo)."""


class UnreadableError(Exception):
    """A module computes something that a decode step does not."""


def read_norm(module: Any, *, width: int = 0, whole: bool = False) -> NormSpec:
    """Return the spec of a norm: RMSNorm or LayerNorm, with weights `w` or `1 + w`, or without weights.

    Args:
        module: The norm.
        width: Size of its input, for a norm without weights.
        whole: See `NormSpec`.

    Raises:
        UnreadableError: It computes something else.
    """
    exact = copy.deepcopy(module).float()
    given = getattr(exact, "weight", None)
    weight = torch.ones(width) if given is None else given.detach()
    bias = None if getattr(exact, "bias", None) is None else exact.bias.detach()
    eps = next((getattr(module, name) for name in EPS_NAMES if hasattr(module, name)), DEFAULT_EPS)
    generator = torch.Generator().manual_seed(0)
    # a mean that is not 0 shows whether it is subtracted; small values show eps
    x = 0.02 * (torch.randn(3, *weight.shape, generator=generator) + 1)
    with torch.no_grad():
        expected = exact(x)
    for is_layer_norm in (False, True):
        for plus in (0.0, 1.0) if given is not None else (0.0,):
            found = NormSpec(weight + plus, bias, eps, is_layer_norm, whole)
            if torch.allclose(normalized(found, x), expected, rtol=1e-4, atol=1e-5):
                return found
    raise UnreadableError(f"{type(module).__name__} is neither RMSNorm nor LayerNorm")


def normalized(norm: NormSpec, x: Tensor) -> Tensor:
    """Return what a norm computes, over the last dimension of float32 `x`."""
    centered = x - x.mean(-1, keepdim=True) if norm.is_layer_norm else x
    scaled = centered * (centered.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    return scaled if norm.bias is None else scaled + norm.bias


def read_activation(module: Any) -> str:
    """Return which of `ACTIVATIONS` a module computes.

    Raises:
        UnreadableError: None of them.
    """
    x = torch.linspace(-8, 8, 1000)
    with torch.no_grad():
        found = module(x)
    for name, function in ACTIVATIONS.items():
        if torch.allclose(found, function(x), rtol=0, atol=1e-5):
            return name
    raise UnreadableError(f"{type(module).__name__} is not supported")


def in_pairs(rotary: Rotary) -> Rotary:
    """Return angles for neighbors that are rotated as pairs, from a module with angles for halves or for pairs."""

    @functools.wraps(rotary)
    def paired(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(x, positions)
        return _paired(cos, halves), _paired(sin, halves)

    _, sin = rotary(torch.zeros(1, 1, 8), torch.tensor([[3]]))
    half = sin.shape[-1] // 2
    halves = bool(torch.equal(sin[..., :half], sin[..., half:]))
    return paired


def _paired(angles: Tensor, halves: bool) -> Tensor:
    return angles[..., : angles.shape[-1] // 2].repeat_interleave(2, -1) if halves else angles


def first_of(module: Any, *names: str) -> Any:
    """Return the first of these attributes that `module` has.

    Raises:
        UnreadableError: It has none.
    """
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return getattr(module, name)
    raise UnreadableError(f"{type(module).__name__} has none of {', '.join(names)}")
