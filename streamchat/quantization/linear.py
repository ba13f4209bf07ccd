"""Linear layers that use quantized weights for a few tokens, and the original weights for many.

If the original weight is a `QuantizedMatrix`, they use its codes for any number of tokens. On a GPU, they always use
the quantized weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamchat.quantization.experts import quantized_experts
from streamchat.quantization.matrix import QuantizedMatrix
from streamchat.quantization.weights import QuantizedWeight

MAX_ROWS = 4
"""Maximum number of tokens for which the quantized product is faster (docs/speed.md)."""


class _QuantizedLayer:
    """State shared by both replacement layers: the parameters of the original layer, and a quantized copy."""

    quantized: QuantizedWeight
    max_rows: int
    plain: Any
    """The original layer."""
    whole: QuantizedWeight
    """The matrix that `quantized` is a part of; a decode step computes layers with the same one as one product."""

    def wrap(self, plain: Any, quantized: QuantizedWeight, whole: QuantizedWeight | None = None) -> None:
        """Share the parameters of `plain`."""
        self.__dict__.update(plain.__dict__)
        self.__dict__["plain"] = plain  # not a child: the parameters are registered on self
        self.quantized, self.whole, self.max_rows = quantized, quantized if whole is None else whole, MAX_ROWS

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """(..., in_features) -> (..., out_features); None if `x` has too many rows."""
        rows = x.numel() // x.shape[-1]
        is_few = rows <= self.max_rows and x.device.type == "cpu"
        if not rows or not (is_few or self.quantized.is_dequantized):
            return None
        out = self.quantized.multiply(x.reshape(rows, -1))
        return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


class QuantizedLinear(_QuantizedLayer, nn.Linear):
    """Replaces an `nn.Linear`; keeps its weight and bias for long inputs."""

    def __init__(self, plain: nn.Linear, quantized: QuantizedWeight, whole: QuantizedWeight | None = None) -> None:
        nn.Module.__init__(self)
        self.wrap(plain, quantized, whole)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(..., in_features) -> (..., out_features)."""
        out = self.product(input, self.bias)
        return nn.functional.linear(input, self.weight, self.bias) if out is None else out


class QuantizedConv1D(_QuantizedLayer, Conv1D):
    """Replaces GPT-2's `Conv1D`, a linear layer whose weight is stored transposed."""

    def __init__(self, plain: Conv1D, quantized: QuantizedWeight) -> None:
        nn.Module.__init__(self)
        self.wrap(plain, quantized)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        out = self.product(x, self.bias)
        if out is not None:
            return out
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a plain linear layer: `nn.Linear` itself, or Falcon's, which differs by rounding only.

    Other subclasses may use the weight differently.
    """
    falcon = type(module).__name__ == "FalconLinear" and type(module).__module__.startswith("transformers.models.")
    return type(module) is nn.Linear or falcon


def quantized_together(layers: Sequence[nn.Module]) -> QuantizedWeight | None:
    """Return the quantized matrix that all of `layers` are parts of, in this order; None if there is none."""
    wholes = [layer.whole if isinstance(layer, QuantizedLinear) else None for layer in layers]
    return wholes[0] if all(whole is wholes[0] for whole in wholes) else None


def joined_bias(layers: Sequence[Any], dtype: torch.dtype) -> Tensor | None:
    """Return the biases of `layers`, (sum of out_features,) of `dtype`; None if no layer has one."""
    if all(layer.bias is None for layer in layers):
        return None
    device = next(layer.bias.device for layer in layers if layer.bias is not None)
    rows = [
        torch.zeros(layer.out_features, device=device) if layer.bias is None else layer.bias.detach()
        for layer in layers
    ]
    return torch.cat([row.to(dtype) for row in rows])


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedConv1D]:
    """Return the quantized layers of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedConv1D)}


def quantized_bytes(model: nn.Module) -> int:
    """Return the memory of quantized copies in `model` in bytes; shared storage counts once.

    Weights that the model has in no other form are not copies.
    """
    copies = [each for each in quantized_layers(model).values() if not isinstance(each.weight, QuantizedMatrix)]
    tensors = [t for layer in copies for t in (layer.quantized.data, layer.quantized.scales)]
    tensors += [t for each in quantized_experts(model).values() for w in each.wholes for t in (w.data, w.scales)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def always_quantized(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: use quantized weights for inputs of any length, to measure their loss of quality."""
    return _rows(model, 1 << 62)


def never_quantized(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: use the model's own weights."""
    return _rows(model, 0)


@contextmanager
def _rows(model: nn.Module, max_rows: int) -> Iterator[None]:
    layers = [*quantized_layers(model).values(), *quantized_experts(model).values()]
    for layer in layers:
        layer.max_rows = max_rows
    try:
        yield
    finally:
        for layer in layers:
            layer.max_rows = MAX_ROWS
