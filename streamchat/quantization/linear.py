"""Linear layers that multiply few tokens by packed weights, and many by their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamchat.quantization.weights import PackedWeight

MAX_ROWS = 4
"""Tokens up to which the packed product is the faster one (docs/speed.md)."""


class _Packed:
    """What both kinds have beside the layer that they take the place of: its own parameters, and a packed copy."""

    packed: PackedWeight
    max_rows: int
    plain: Any
    whole: PackedWeight
    """What `packed` is a part of: the layers with the same one are multiplied together in a decode step."""

    def take(self, plain: Any, packed: PackedWeight, whole: PackedWeight | None = None) -> None:
        """Share the parameters of `plain`."""
        self.__dict__.update(plain.__dict__)
        self.__dict__["plain"] = plain  # not a child: its parameters are ours
        self.packed, self.whole, self.max_rows = packed, packed if whole is None else whole, MAX_ROWS

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """(..., in_features) -> (..., out_features); None where `x` has too many rows."""
        rows = x.numel() // x.shape[-1]
        if not 0 < rows <= self.max_rows or x.device.type != "cpu":
            return None
        out = self.packed.multiply(x.reshape(rows, -1))
        return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


class PackedLinear(_Packed, nn.Linear):
    """Stands for an `nn.Linear`, whose weight and bias it keeps for long inputs."""

    def __init__(self, plain: nn.Linear, packed: PackedWeight, whole: PackedWeight | None = None) -> None:
        nn.Module.__init__(self)
        self.take(plain, packed, whole)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """(..., in_features) -> (..., out_features)."""
        out = self.product(input, self.bias)
        return nn.functional.linear(input, self.weight, self.bias) if out is None else out


class PackedConv1D(_Packed, Conv1D):
    """Stands for GPT-2's `Conv1D`: a linear layer whose weight is stored transposed."""

    def __init__(self, plain: Conv1D, packed: PackedWeight) -> None:
        nn.Module.__init__(self)
        self.take(plain, packed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        out = self.product(x, self.bias)
        if out is not None:
            return out
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedConv1D]:
    """All packed layers of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedConv1D)}


def packed_bytes(model: nn.Module) -> int:
    """Memory of all packed weights of `model`; matrices that are parts of one count once."""
    tensors = [t for layer in packed_layers(model).values() for t in (layer.packed.data, layer.packed.scales)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@contextmanager
def always_packed(model: nn.Module) -> Iterator[None]:
    """Inside, inputs of any length use the packed weights: to measure what they cost in quality."""
    with _rows(model, 1 << 62):
        yield


@contextmanager
def never_packed(model: nn.Module) -> Iterator[None]:
    """Inside, the model uses its own weights."""
    with _rows(model, 0):
        yield


@contextmanager
def _rows(model: nn.Module, most: int) -> Iterator[None]:
    layers = packed_layers(model).values()
    for layer in layers:
        layer.max_rows = most
    try:
        yield
    finally:
        for layer in layers:
            layer.max_rows = MAX_ROWS
