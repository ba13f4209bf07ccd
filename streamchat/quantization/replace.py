"""Packing the linear layers of a model, and putting the packed ones in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamchat.quantization.linear import PackedConv1D, PackedLinear, packed_layers
from streamchat.quantization.weights import TILE_ROWS, Kind, PackedWeight, pack, packs

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Siblings that read the same input: packed as one matrix, they take one product."""


def groups(model: nn.Module, kind: Kind) -> list[tuple[str, ...]]:
    """Names of the layers to pack; those in one tuple are packed as one matrix, in this order."""
    names = {name: module for name, module in model.named_modules() if _weight(module) is not None}
    names = {name: module for name, module in names.items() if packs(kind, *_size(module))}
    found: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for name in names:
        if name in taken:
            continue
        group = _siblings(name, names, kind)
        taken.update(group)
        found.append(group)
    return found


def pack_group(model: nn.Module, group: tuple[str, ...], kind: Kind) -> PackedWeight:
    """The weights of `group`, one below the other, packed. The output layer is int8 with int4, too."""
    weights = [_weight(model.get_submodule(name)) for name in group]
    return pack(torch.cat([weight.detach() for weight in weights if weight is not None]), kind_of(model, group, kind))


def kind_of(model: Any, group: tuple[str, ...], kind: Kind) -> Kind:
    """int4 in the output layer costs 4 % of perplexity and saves 1 ms of the default model's 10 (docs/speed.md)."""
    return "int8" if model.get_submodule(group[0]) is model.get_output_embeddings() else kind


def replace(model: nn.Module, packed: Mapping[tuple[str, ...], PackedWeight]) -> None:
    """Put packed layers in the place of those named; their own weights stay, for long inputs and tied embeddings."""
    for group, weight in packed.items():
        first = 0
        for name in group:
            plain = model.get_submodule(name)
            stop = first + _size(plain)[0]
            part = weight if len(group) == 1 else weight.part(first, stop)
            layer = _packed_layer(plain, part, weight)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            first = stop


def restore(model: nn.Module) -> None:
    """Take all packed layers out again."""
    for name, layer in packed_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.plain)


def _siblings(name: str, names: Mapping[str, nn.Module], kind: Kind) -> tuple[str, ...]:
    parent, _, child = name.rpartition(".")
    for together in TOGETHER:
        group = tuple(f"{parent}.{each}" for each in together)
        if child not in together or not all(each in names for each in group):
            continue
        sizes = [_size(names[each]) for each in group]
        # rows of a tile must be of one layer
        if len({columns for _, columns in sizes}) == 1 and (kind == "int8" or _whole_tiles(sizes)):
            return group
    return (name,)


def _whole_tiles(sizes: list[tuple[int, int]]) -> bool:
    return all(rows % TILE_ROWS == 0 for rows, _ in sizes)


def _weight(module: nn.Module) -> Tensor | None:
    """(out_features, in_features), of the layer kinds that can be packed."""
    # subclasses compute something else with it
    if type(module) is nn.Linear:
        return module.weight
    return module.weight.T if type(module) is Conv1D else None


def _size(module: nn.Module) -> tuple[int, int]:
    weight = _weight(module)
    assert weight is not None
    return weight.shape[0], weight.shape[1]


def _packed_layer(plain: nn.Module, part: PackedWeight, whole: PackedWeight) -> nn.Module:
    if isinstance(plain, Conv1D):
        return PackedConv1D(plain, part)
    assert isinstance(plain, nn.Linear)
    return PackedLinear(plain, part, whole)
