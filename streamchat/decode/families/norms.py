"""Learns what a norm of a model computes by comparing its values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.decode.families.errors import UnsupportedPartError
from streamchat.decode.spec import NormSpec

_DEFAULT_EPS = 1e-5
"""The constant of norms without weights (OLMo)."""


def norm_spec(module: Any, width: int, whole: bool = False, device: torch.device | None = None) -> NormSpec:
    """Return what `module` computes for vectors of `width`.

    Args:
        module: A norm of transformers or PyTorch.
        width: Size of the vectors.
        whole: The norm covers all heads of a token together.
        device: Where a norm without weights of its own is computed; None for the CPU.

    Raises:
        UnsupportedPartError: It is neither RMSNorm nor LayerNorm.
    """
    if isinstance(getattr(module, "norms", None), torch.nn.ModuleList):
        return _norm_per_head(module.norms, width)
    given = getattr(module, "weight", None)
    like = torch.ones(width, device=device) if given is None else given.detach()
    x = _probe(like)
    found = module(x).float()
    for spec in _candidates(module, like.float(), whole, weights=given is not None):
        if torch.allclose(found, _apply(spec, x.float()), rtol=0.02, atol=0.02):
            return spec
    raise UnsupportedPartError(f"{type(module).__name__} is not a known norm")


def _norm_per_head(norms: Any, width: int) -> NormSpec:
    """Return the norm of all heads, each with its own weights."""
    specs = [norm_spec(each, width) for each in norms]
    biases = [spec.bias for spec in specs if spec.bias is not None]
    bias = torch.stack(biases) if biases else None
    return NormSpec(torch.stack([spec.weight for spec in specs]), bias, specs[0].eps, specs[0].is_layer_norm)


def _probe(like: Tensor) -> Tensor:
    """Return two inputs with the shape of the weights and a nonzero mean; one is so small that `eps` matters."""
    generator = torch.Generator().manual_seed(0)
    x = 1.0 + torch.randn(like.shape, generator=generator)
    return torch.stack([x, 0.004 * x])[None].to(like)


def _candidates(module: Any, weight: Tensor, whole: bool, weights: bool) -> Iterator[NormSpec]:
    """Yield what the module may compute: RMSNorm or LayerNorm, with its weights or its weights plus 1."""
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), _DEFAULT_EPS)
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().float()
    for is_layer_norm in (False, True):
        for offset in (0.0, 1.0) if weights else (0.0,):
            yield NormSpec(weight + offset, bias if is_layer_norm else None, eps, is_layer_norm, whole)


def _apply(spec: NormSpec, x: Tensor) -> Tensor:
    width = (x.shape[-1],)
    if not spec.is_layer_norm:
        return functional.rms_norm(x, width, None, spec.eps) * spec.weight
    normed = functional.layer_norm(x, width, None, None, spec.eps) * spec.weight
    return normed if spec.bias is None else normed + spec.bias
