"""Quantizes the linear layers and the experts of a model, and replaces them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import TILE
from streamchat.quantization.codes import is_grouped
from streamchat.quantization.experts import STACKED, QuantizedExperts, is_experts, quantized_experts
from streamchat.quantization.linear import (
    MAX_ROWS,
    QuantizedConv1D,
    QuantizedLinear,
    is_linear,
    quantized_layers,
)
from streamchat.quantization.weights import Kind, QuantizedWeight, can_quantize, quantize, rows_together

Choice = Kind | Literal["auto"]

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling layers with the same input: quantized as one matrix, they need one product."""


def groups(model: nn.Module, asked: Choice) -> dict[tuple[str, ...], Kind]:
    """Return the layers to quantize, and how; those in one tuple form one matrix, in this order.

    Parameters that stack the weights of experts count as layers; their rows form one matrix.

    Args:
        model: The model; its linear layers are inspected in order.
        asked: The kind of all layers but the output layer, which is int8. `auto` is int4 for layers whose weights were
            quantized in such groups before, and int8 for others.
    """
    kinds = {name: kind for name, layer in model.named_modules() if (kind := _kind(model, layer, asked)) is not None}
    for name, module in model.named_modules():
        if is_experts(module):
            kinds |= {f"{name}.{part}": kind for part, kind in _expert_kinds(module, asked).items()}
    sizes = {name: layer_size(find_part(model, name)) for name in kinds}
    result: dict[tuple[str, ...], Kind] = {}
    grouped: set[str] = set()
    for name, kind in kinds.items():
        if name not in grouped:
            group = _siblings(name, kinds, sizes)
            grouped.update(group)
            result[group] = kind
    return result


def quantize_group(
    model: nn.Module, group: tuple[str, ...], kind: Kind, kernels: Kernels | None, *, tiled: bool = False
) -> QuantizedWeight:
    """Return the concatenated weights of `group`, quantized for these kernels (None: PyTorch's).

    Args:
        model: The model of the layers.
        group: Their names.
        kind: The precision.
        kernels: The compiled kernels that will multiply.
        tiled: Make tiles without kernels, too.
    """
    weights = [weight.detach() for name in group if (weight := _weight(find_part(model, name))) is not None]
    joined = weights[0] if len(weights) == 1 else torch.cat(weights)
    return quantize(joined, kind, kernels, tiled=tiled)


def find_part(model: nn.Module, name: str) -> nn.Module | Tensor:
    """Return the layer of this name, or the parameter that stacks the weights of experts."""
    parent, _, child = name.rpartition(".")
    part: nn.Module | Tensor = getattr(model.get_submodule(parent), child)
    return part


def layer_size(layer: nn.Module | Tensor) -> tuple[int, int]:
    """Return output and input features of a layer that can be quantized."""
    weight = _weight(layer)
    assert weight is not None
    return weight.shape[0], weight.shape[1]


def replace(model: nn.Module, weights: Mapping[tuple[str, ...], QuantizedWeight]) -> None:
    """Replace the named layers by quantized ones; their own weights stay, for long inputs and tied embeddings."""
    for name in {group[0].rpartition(".")[0] for group in weights if _is_stacked(model, group)}:
        up, down = (weights[(f"{name}.{part}",)] for part in STACKED)
        model.set_submodule(name, QuantizedExperts(model.get_submodule(name), up, down, MAX_ROWS))
    for group, weight in weights.items():
        if _is_stacked(model, group):
            continue
        first = 0
        for name in group:
            plain: Any = model.get_submodule(name)
            stop = first + layer_size(plain)[0]
            part = weight if len(group) == 1 else weight.part(first, stop)
            layer = QuantizedConv1D(plain, part) if isinstance(plain, Conv1D) else QuantizedLinear(plain, part, weight)
            model.set_submodule(name, layer)
            first = stop


def restore(model: nn.Module) -> None:
    """Replace all quantized layers by the original ones."""
    for name, layer in quantized_layers(model).items():
        model.set_submodule(name, layer.plain)
    for name, experts in quantized_experts(model).items():
        model.set_submodule(name, experts.plain)


def _is_stacked(model: nn.Module, group: tuple[str, ...]) -> bool:
    return isinstance(find_part(model, group[0]), Tensor)


def _expert_kinds(module: Any, asked: Choice) -> dict[str, Kind]:
    """Return how to quantize the parameters of experts; empty if any of them cannot be quantized."""
    kinds: dict[str, Kind] = {}
    for name in STACKED:
        weight: Tensor = getattr(module, name)
        rows, columns = weight.shape[1:]
        int4 = can_quantize("int4", rows, columns) and rows % rows_together("int4") == 0
        kind: Kind = "int4" if int4 and (asked == "int4" or (asked == "auto" and is_grouped(weight[0]))) else "int8"
        if not can_quantize(kind, rows, columns) or rows % rows_together(kind):
            return {}
        kinds[name] = kind
    return kinds if module.down_proj.shape[-1] % TILE == 0 else {}


def _kind(model: Any, layer: nn.Module, asked: Choice) -> Kind | None:
    """Return how to quantize a layer of `model`; None if it cannot be quantized.

    The output layer is never int4: that costs too much quality (docs/speed.md).
    """
    weight = _weight(layer)
    if weight is None or weight.shape[0] == 1:  # the gate of a shared expert: a tile has 16 rows
        return None
    kind: Kind = "int4" if asked == "int4" and layer is not model.get_output_embeddings() else "int8"
    if asked == "auto" and layer is not model.get_output_embeddings():
        kind = "int4" if can_quantize("int4", *weight.shape) and is_grouped(weight) else "int8"
    return kind if can_quantize(kind, *weight.shape) else None


def _siblings(name: str, kinds: Mapping[str, Kind], sizes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    parent, _, child = name.rpartition(".")
    unit = rows_together(kinds[name])  # all rows of a tile must belong to one layer
    for together in TOGETHER:
        group = tuple(f"{parent}.{each}" for each in together)
        if child not in together or any(kinds.get(each) != kinds[name] for each in group):
            continue
        have_one_width = len({sizes[each][1] for each in group}) == 1
        if have_one_width and all(sizes[each][0] % unit == 0 for each in group):
            return group
    return (name,)


def _weight(module: nn.Module | Tensor) -> Tensor | None:
    """Return the (out_features, in_features) weight of a layer that can be quantized, else None."""
    if isinstance(module, Tensor):
        return module.flatten(0, 1)
    if is_linear(module):
        weight: Tensor = cast(nn.Linear, module).weight
        return weight
    return module.weight.T if type(module) is Conv1D else None
