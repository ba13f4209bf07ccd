"""Quantizes the linear layers of a model, and replaces them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamchat.kernels.library import Kernels
from streamchat.quantization.linear import QuantizedConv1D, QuantizedLinear, is_linear, quantized_layers
from streamchat.quantization.weights import Kind, QuantizedWeight, can_quantize, quantize, rows_together

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling layers with the same input: quantized as one matrix, they need one product."""


def groups(model: nn.Module, kind: Kind) -> list[tuple[str, ...]]:
    """Return the names of the layers to quantize; those in one tuple form one matrix, in this order."""
    names = {name: module for name, module in model.named_modules() if _weight(module) is not None}
    names = {name: module for name, module in names.items() if can_quantize(kind, *_size(module))}
    result: list[tuple[str, ...]] = []
    grouped: set[str] = set()
    for name in names:
        if name in grouped:
            continue
        group = _siblings(name, names, kind)
        grouped.update(group)
        result.append(group)
    return result


def quantize_group(model: nn.Module, group: tuple[str, ...], kind: Kind, kernels: Kernels | None) -> QuantizedWeight:
    """Return the concatenated weights of `group`, quantized for these kernels (None: PyTorch's).

    The output layer is int8 even if `kind` is int4.
    """
    weights = [_weight(model.get_submodule(name)) for name in group]
    whole = torch.cat([weight.detach() for weight in weights if weight is not None])
    return quantize(whole, kind_of(model, group, kind), kernels)


def kind_of(model: Any, group: tuple[str, ...], kind: Kind) -> Kind:
    """Return the format of `group`: int8 for the output layer, else `kind`.

    int4 in the output layer would cost 4 % of perplexity and save 1 ms of the default model's 10 (docs/speed.md).
    """
    return "int8" if model.get_submodule(group[0]) is model.get_output_embeddings() else kind


def replace(model: nn.Module, weights: Mapping[tuple[str, ...], QuantizedWeight]) -> None:
    """Replace the named layers by quantized ones; their own weights stay, for long inputs and tied embeddings."""
    for group, weight in weights.items():
        first = 0
        for name in group:
            plain: Any = model.get_submodule(name)
            stop = first + _size(plain)[0]
            part = weight if len(group) == 1 else weight.part(first, stop)
            layer = QuantizedConv1D(plain, part) if isinstance(plain, Conv1D) else QuantizedLinear(plain, part, weight)
            model.set_submodule(name, layer)
            first = stop


def restore(model: nn.Module) -> None:
    """Replace all quantized layers by the original ones."""
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, layer.plain)


def _siblings(name: str, names: Mapping[str, nn.Module], kind: Kind) -> tuple[str, ...]:
    parent, _, child = name.rpartition(".")
    for together in TOGETHER:
        group = tuple(f"{parent}.{each}" for each in together)
        if child not in together or not all(each in names for each in group):
            continue
        sizes = [_size(names[each]) for each in group]
        have_one_width = len({columns for _, columns in sizes}) == 1
        # all rows of a tile must belong to one layer
        if have_one_width and all(rows % rows_together(kind) == 0 for rows, _ in sizes):
            return group
    return (name,)


def _weight(module: nn.Module) -> Tensor | None:
    """Return the (out_features, in_features) weight of a layer that can be quantized, else None."""
    if is_linear(module):
        weight: Tensor = cast(nn.Linear, module).weight
        return weight
    return module.weight.T if type(module) is Conv1D else None


def _size(module: nn.Module) -> tuple[int, int]:
    weight = _weight(module)
    assert weight is not None
    return weight.shape[0], weight.shape[1]
