"""Mixtures of experts, read from their modules and compared with what these compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from streamchat.decode.experts import choose, compute
from streamchat.decode.families.errors import UnsupportedPartError
from streamchat.decode.families.parts import first_of, read_mlp
from streamchat.decode.spec import ExpertsSpec, activation_name
from streamchat.quantization.experts import QuantizedExperts

_ROWS = 5
"""Rows of the input of the comparison, all equal: enough for quantized layers to use their own weights."""
_SPREAD = 0.5
"""Of the router's logits in the comparison."""
_CLOSE = 0.1
"""Largest accepted distance, as a share of the output; rounding to 16 bits is far below."""


def has_experts(module: Any) -> bool:
    """Return whether a module in the place of an MLP is a mixture of experts."""
    return first_of(module, "experts", "router") is not None


def read_experts(module: Any, top_k: int, shared: Any = None) -> ExpertsSpec:
    """Read a mixture of experts; the weights of each matrix are stacked in one parameter.

    Args:
        module: The router and the experts, and perhaps an MLP for all tokens with its gate.
        top_k: Experts per token.
        shared: An MLP for all tokens that is not in `module`.

    Raises:
        UnsupportedPartError: It has other parameters, or computes something else.
    """
    experts, router = getattr(module, "experts", None), first_of(module, "gate", "router")
    if experts is None:  # Granite in older versions of transformers
        gate_up, down, act = module.input_linear.weight, module.output_linear.weight, module.activation
    else:
        gate_up, down, act = experts.gate_up_proj, experts.down_proj, experts.act_fn
    own = getattr(module, "shared_expert", None)
    spec = ExpertsSpec(
        router=router.weight if experts is not None else router.layer.weight,
        gate_up=gate_up,
        down=down,
        act=activation_name(act),
        top_k=top_k,
        is_normalized=True,
        shared=None if own is None else read_mlp(own),
        shared_gate=getattr(module, "shared_expert_gate", None),
        quantized=experts if isinstance(experts, QuantizedExperts) else None,
    )
    if not spec.act or not _covers(spec, module, own):
        raise UnsupportedPartError(f"the parts of {type(module).__name__} are not known")
    found = _closest(spec, module, own)
    return found if shared is None else replace(found, shared=read_mlp(shared))


def _covers(spec: ExpertsSpec, module: Any, own: Any) -> bool:
    """Return whether the spec has all parameters of the module, in shapes that fit together."""
    known = [spec.router, spec.gate_up, spec.down]
    known += [weight for part in (own, spec.shared_gate) if part is not None for weight in part.parameters()]
    experts, hidden = spec.router.shape
    width = spec.down.shape[-1]
    shapes = spec.gate_up.shape == (experts, 2 * width, hidden) and spec.down.shape == (experts, hidden, width)
    return shapes and {id(weight) for weight in module.parameters()} == {id(weight) for weight in known}


def _closest(spec: ExpertsSpec, module: Any, own: Any) -> ExpertsSpec:
    """Return the spec that computes what `module` does for a random token.

    Raises:
        UnsupportedPartError: None does.
    """
    row = torch.randn(spec.router.shape[1], generator=torch.Generator().manual_seed(0))
    # no expert gets nearly all of the weight: the shares of the chosen ones in all would then be their softmax
    row *= _SPREAD / (spec.router.float().cpu() @ row).std().clamp_min(1e-6)
    x = row.to(spec.router).expand(1, _ROWS, -1)
    result = module(x)
    found = (result[0] if isinstance(result, tuple) else result)[0, 0].float()
    if own is not None:
        extra = own(x[0])
        if spec.shared_gate is not None:
            extra = torch.sigmoid(spec.shared_gate(x[0])) * extra
        found = found - extra[0].float()
    candidates = [replace(spec, is_normalized=is_normalized) for is_normalized in (True, False)]
    errors = [float((_one_by_one(candidate, x[0]) - found).norm()) for candidate in candidates]
    if min(errors) > _CLOSE * float(found.norm()):
        raise UnsupportedPartError(f"{type(module).__name__} chooses or weights its experts in another way")
    return candidates[errors.index(min(errors))]


def _one_by_one(spec: ExpertsSpec, x: Tensor) -> Tensor:
    """(rows, hidden), all rows equal -> (hidden) float32, with the model's own weights."""
    shares, chosen = choose(spec, x)
    return compute(replace(spec, quantized=None), x[:1], shares[0], chosen[0].tolist())[0].float()
