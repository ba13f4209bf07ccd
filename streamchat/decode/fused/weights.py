"""The weights of a product as the fused kernels read them: native, or quantized in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamchat.kernels.operations import SUPER_16, SUPER_32, TILE
from streamchat.quantization.layouts import Layout
from streamchat.quantization.linear import QuantizedLinear, is_linear, quantized_together
from streamchat.quantization.weights import Kind, QuantizedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of native weights."""
MAX_MATRICES = 3


@dataclass(frozen=True)
class NativeWeights:
    """One to three (rows, columns) matrices in the memory of the first and at distances from it."""

    first: Tensor
    rows: list[int]
    stride: int
    """Elements from row to row."""
    offsets: list[int]
    """Elements from the first matrix to the second and the third; 0 if there is none."""


@dataclass(frozen=True)
class TileWeights:
    """One to three matrices in tiles of the same layout, the same way."""

    first: Tensor
    """(tiles, units, bytes of a unit) uint8."""
    layout: Layout
    rows: list[int]
    stride: int
    """Bytes from tile to tile."""
    offsets: list[int]
    """In bytes."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the kernel that are the matrix, as it reads different parts of it."""
        flat = self.first.view(-1)
        small = {SUPER_32: torch.uint8, SUPER_16: torch.int8}.get(self.layout.scales, torch.uint8)
        return {
            "words": flat.view(torch.int16 if self.layout.bits == 8 else torch.int32),
            "halves": flat.view(torch.float16),
            "small": flat.view(small),
            "BITS": self.layout.bits,
            "SCALES": self.layout.scales,
        }


def can_read(layers: Sequence[Any], gated: bool, dtype: torch.dtype) -> bool:
    """Return whether the kernels can multiply with `layers` as one product."""
    tiled = [isinstance(layer, QuantizedLinear) for layer in layers]
    if gated and len(layers) == 1 and layers[0].out_features % (2 * TILE if all(tiled) else 2):
        return False
    if not any(tiled):
        plain = all(is_linear(layer) and is_plain(layer.weight) and layer.weight.dtype == dtype for layer in layers)
        strides = {layer.weight.stride() for layer in layers} if plain else set()
        return len(layers) <= MAX_MATRICES and dtype in DTYPES and len(strides) == 1 and strides.pop()[1] == 1
    if not all(tiled):
        return False
    parts = _parts(layers, gated)
    is_same = len({part.layout for part in parts}) == 1 and all(part.tiled for part in parts)
    return is_same and len(parts) <= MAX_MATRICES and all(part.data.is_contiguous() for part in parts)


def can_read_tiles(layers: Sequence[Any], gated: bool, kinds: Sequence[Kind | None]) -> bool:
    """Return whether the kernels could multiply with `layers`, which they can read, if they were quantized to tiles.

    Args:
        layers: Native linear layers that are one product.
        gated: Whether their results are multiplied.
        kinds: How each would be quantized; None if it stays native.
    """
    if kinds[0] is None or any(kind != kinds[0] for kind in kinds):
        return not any(kinds)
    return not gated or len(layers) > 1 or layers[0].out_features % (2 * TILE) == 0


def is_plain(weight: Any) -> bool:
    """Return whether a weight is a matrix in memory; a subclass, such as torchao's, may have codes instead."""
    return type(weight) in (Tensor, nn.Parameter)


def read_weights(layers: Sequence[Any], gated: bool) -> NativeWeights | TileWeights:
    """Return the matrices of `layers`; two of the same size with a gate."""
    if isinstance(layers[0], QuantizedLinear):
        parts = _parts(layers, gated)
        data, rows = [part.data for part in parts], [part.rows for part in parts]
        if gated and len(parts) == 1:
            rows = [rows[0] // 2] * 2
            data = [data[0][: rows[0] // TILE], data[0][rows[0] // TILE :]]
        layout = parts[0].tile_layout
        return TileWeights(data[0], layout, rows, data[0].stride(0), _offsets(data))
    found = [layer.weight.detach() for layer in layers]
    if gated and len(found) == 1:
        found = list(found[0].chunk(2))
    return NativeWeights(found[0], [len(each) for each in found], found[0].stride(0), _offsets(found))


def _parts(layers: Sequence[Any], gated: bool) -> list[QuantizedWeight]:
    """Return the quantized matrices of `layers`; the one that all are parts of, unless they are multiplied."""
    whole = None if gated else quantized_together(layers)
    return [layer.quantized for layer in layers] if whole is None else [whole]


def _offsets(matrices: Sequence[Tensor]) -> list[int]:
    """Return the elements from the first matrix to the second and the third; 0 if there is none."""
    first = matrices[0]
    found = [(each.data_ptr() - first.data_ptr()) // first.element_size() for each in matrices[1:]]
    return [*found, 0, 0][:2]
