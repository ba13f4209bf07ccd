"""Blocks of GGUF files as tiles, without a loss: only the order of the codes and scales changes.

The formats are those of ggml's block structures (https://github.com/ggml-org/ggml, ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import quant_shape_from_byte_shape
from numpy.typing import NDArray
from torch import Tensor

from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import TILE
from streamchat.quantization.layouts import LAYOUTS, Coded, LayoutName, tiles
from streamchat.quantization.unpack import rows_together
from streamchat.quantization.weights import QuantizedWeight

SERVED: Mapping[Type, LayoutName] = {
    Type.Q4_0: "int4",
    Type.Q4_1: "int4",
    Type.Q5_0: "int8",
    Type.Q5_1: "int8_min",
    Type.Q8_0: "int8",
    Type.Q3_K: "int8_k16",
    Type.Q4_K: "int4_k",
    Type.Q5_K: "int8_k",
    Type.Q6_K: "int8_k16",
}
"""Types of tensors that become tiles without a loss."""
SUPER = 256
"""Columns of a superblock."""


def tiles_of_gguf(
    data: NDArray[np.uint8], kind: Type, order: NDArray[np.int64] | None, kernels: Kernels | None
) -> QuantizedWeight:
    """Return a matrix of a GGUF file as tiles.

    Args:
        data: (rows, bytes of a row), as `gguf.GGUFReader` gives it.
        kind: Type of the tensor, one of `SERVED`.
        order: (rows,): rows of the file in the order of the matrix; None for the same order.
        kernels: The compiled kernels that will multiply; None if the weights will be dequantized only.
    """
    rows, columns = quant_shape_from_byte_shape(data.shape, kind)
    name, read = SERVED[kind], _READERS[kind]
    if kind == Type.Q4_0 and _exceeds_float16(data):
        name, read = "int8", _signed_q4_0
    layout = LAYOUTS[name]
    made = torch.empty(-(-rows // TILE), columns // layout.columns, layout.unit_bytes, dtype=torch.uint8)
    step = rows_together(columns)
    for first in range(0, rows, step):
        part = data[first : first + step] if order is None else data[order[first : first + step]]
        blocks = torch.from_numpy(np.array(part)).view(len(part), -1, _block_bytes(kind))
        made[first // TILE : first // TILE + -(-len(part) // TILE)] = tiles(layout, read(blocks))
    return QuantizedWeight(name, made, torch.empty(0, dtype=torch.bfloat16), rows, kernels)


def _block_bytes(kind: Type) -> int:
    from gguf.constants import GGML_QUANT_SIZES

    return int(GGML_QUANT_SIZES[kind][1])


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return a float16 number of each block."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(data: Tensor) -> Tensor:
    """(..., n) -> (..., 2 n): the low halves, then the high ones."""
    return torch.cat([data & 15, data >> 4], -1)


def _fifth_bits(data: Tensor) -> Tensor:
    """(..., 4) -> (..., 32): each bit of the four bytes, times 16."""
    bits = data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def _q4_0(blocks: Tensor) -> Coded:
    scale = _half(blocks, 0)
    return Coded(_nibbles(blocks[..., 2:]), [scale, scale * -8])


def _signed_q4_0(blocks: Tensor) -> Coded:
    return Coded(_nibbles(blocks[..., 2:]).view(torch.int8) - 8, [_half(blocks, 0)])


def _exceeds_float16(data: NDArray[np.uint8]) -> bool:
    """Return whether a minimum of a Q4_0 matrix, -8 times its scale, is too large for float16."""
    scales = np.abs(data.reshape(-1, _block_bytes(Type.Q4_0))[:, :2].copy().view(np.float16))
    return bool(np.any(np.isfinite(scales) & (scales > torch.finfo(torch.float16).max / 8)))


def _q4_1(blocks: Tensor) -> Coded:
    return Coded(_nibbles(blocks[..., 4:]), [_half(blocks, 0), _half(blocks, 2)])


def _q5_0(blocks: Tensor) -> Coded:
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return Coded(codes.view(torch.int8) - 16, [_half(blocks, 0)])


def _q5_1(blocks: Tensor) -> Coded:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Coded(codes, [_half(blocks, 0), _half(blocks, 2)])


def _q8_0(blocks: Tensor) -> Coded:
    return Coded(blocks[..., 2:].contiguous(), [_half(blocks, 0)])


def _six_bit_scales(data: Tensor) -> list[Tensor]:
    """(rows, blocks, 12) -> scales and minimums of Q4_K and Q5_K, each (rows, 8 * blocks)."""
    first, second, last = torch.split(data, 4, -1)
    scales = torch.cat([first & 63, last & 15 | first >> 6 << 4], -1)
    minimums = torch.cat([second & 63, last >> 4 | second >> 6 << 4], -1)
    return [scales.flatten(1), minimums.flatten(1)]


def _halves_of_64(data: Tensor) -> Tensor:
    """(rows, blocks, 128) -> (rows, blocks, 8, 32): 32 bytes hold two groups."""
    bytes_ = torch.unflatten(data, -1, (4, 1, 32))
    return torch.cat([bytes_ & 15, bytes_ >> 4], -2).flatten(-3, -2)


def _q4_k(blocks: Tensor) -> Coded:
    codes = _halves_of_64(blocks[..., 16:]).flatten(1, 2)
    return Coded(codes, _six_bit_scales(blocks[..., 4:16]), [_half(blocks, 0), _half(blocks, 2)])


def _q5_k(blocks: Tensor) -> Coded:
    high = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    codes = (_halves_of_64(blocks[..., 48:]) | high << 4).flatten(1, 2)
    return Coded(codes, _six_bit_scales(blocks[..., 4:16]), [_half(blocks, 0), _half(blocks, 2)])


def _q6_k(blocks: Tensor) -> Coded:
    low, high, scales, _ = torch.split(blocks, [128, 64, 16, 2], -1)
    # of each half of the columns: 64 bytes of low bits, 32 of high bits
    low = torch.unflatten(low, -1, (2, 1, 2, 32))
    low = torch.cat([low & 15, low >> 4], -3).flatten(-3, -2)
    high = torch.unflatten(high, -1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    codes = (low | high << 4).view(torch.int8) - 32
    return _by_16(codes.flatten(-3, -2), scales, _half(blocks, 208))


def _q3_k(blocks: Tensor) -> Coded:
    mask, low, packed, _ = torch.split(blocks, [32, 64, 12, 2], -1)
    low = torch.unflatten(low, -1, (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    high = mask[..., None, :] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    codes = (low.flatten(-3, -2) | high << 2).view(torch.int8) - 4
    scales = _nibbles(packed[..., :8]) | torch.cat([packed[..., 8:] >> bits & 3 for bits in (0, 2, 4, 6)], -1) << 4
    return _by_16(codes, (scales.view(torch.int8) - 32).view(torch.uint8), _half(blocks, 108))


def _by_16(codes: Tensor, scales: Tensor, factor: Tensor) -> Coded:
    """(rows, blocks, 8, 32) int8 codes, and (rows, blocks, 16) signed scales of 16 columns each."""
    pairs = torch.unflatten(scales.contiguous().view(torch.int8), -1, (8, 2)).flatten(1, 2)
    return Coded(codes.flatten(1, 2), [pairs[..., 0], pairs[..., 1]], [factor, torch.zeros_like(factor)])


_READERS: Mapping[Type, Callable[[Tensor], Coded]] = {
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q5_0: _q5_0,
    Type.Q5_1: _q5_1,
    Type.Q8_0: _q8_0,
    Type.Q3_K: _q3_k,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q5_k,
    Type.Q6_K: _q6_k,
}
"""Read (rows, blocks, bytes of a block) uint8."""
