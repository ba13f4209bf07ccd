"""Random matrices in every format of the kernels, and the numbers that they represent.

Independent of the code that quantizes, it follows the comments in `source/tiles.h` and `source/operations.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    GROUP,
    SCALE_MIN,
    SUPER_32,
    SUPERBLOCK,
    TILE,
    Matrix,
    unit_size,
)
from tools.kernel_programs.bounded import Bounded
from tools.kernel_programs.memory import Memory
from tools.kernel_programs.numbers import Draw

Array = NDArray[Any]


@dataclass(frozen=True)
class Weights:
    """A matrix: the stored data, and the numbers that it represents."""

    bits: int
    kind: int
    rows: int
    columns: int
    data: Array
    value: Array
    """(rows, columns)"""
    size: Array
    """Sum of the magnitudes of the parts of each weight."""

    @property
    def is_quantized(self) -> bool:
        return self.bits < 16

    def place(self, memory: Memory, bias: Array | None) -> Matrix:
        """Return the matrix with the address of a copy of the data."""
        return Matrix(memory.give(self.data), memory.give(bias), self.rows, self.bits, self.kind)


def column_unit(bits: int, kind: int) -> int:
    """Return the number of which the number of columns must be a multiple."""
    return unit_size(bits, kind)[0] if bits < 16 else 1


def random_weights(draw: Draw, bits: int, kind: int, rows: int, columns: int) -> Weights:
    """Return a random matrix in a format of `check_matrices.MATRICES`."""
    if bits < 16:
        data, value, size = _tiles(draw, bits, kind, -(-rows // TILE), columns)
        return Weights(bits, kind, rows, columns, data, value[:rows], size[:rows])
    data = encode(kind, draw.numbers(rows, columns))
    value = decode(kind, data)
    return Weights(bits, kind, rows, columns, data, value, np.abs(value))


def _tiles(draw: Draw, bits: int, kind: int, tiles: int, columns: int) -> tuple[Array, Array, Array]:
    groups, block = columns // GROUP, unit_size(bits, SCALE_MIN if kind == SCALE_MIN else 0)[1]
    blocks = draw.arrays.integers(0, 256, (tiles, groups, block), dtype=np.uint8)
    codes = (_int4_codes if bits == 4 else _int8_codes)(blocks[..., : 64 * bits])
    tail = blocks[..., 64 * bits :]
    if kind < SUPER_32:
        halves = draw.numbers(tiles, groups, tail.shape[-1] // 2, scale=0.05).astype(np.float16)
        tail[:] = halves.view(np.uint8)
        scale, minimum = halves[..., :TILE], halves[..., TILE:]
        minimum = minimum if kind == SCALE_MIN else np.zeros_like(scale)
        return blocks, *_meaning(codes, _by_row(scale), _by_row(minimum))
    header = draw.numbers(tiles, groups // SUPERBLOCK, 2 * TILE, scale=0.002).astype(np.float16)
    factors = header.astype(float).repeat(SUPERBLOCK, 1)
    data = np.concatenate([header.view(np.uint8), blocks.reshape(tiles, groups // SUPERBLOCK, SUPERBLOCK * block)], -1)
    first, second = tail[..., :TILE], tail[..., TILE:]
    if kind == SUPER_32:
        scale, minimum = first * factors[..., :TILE], second * -factors[..., TILE:]
        return data, *_meaning(codes, _by_row(scale), _by_row(minimum))
    parts = [_by_row(part.view(np.int8) * factors[..., :TILE]) for part in (first, second)]
    scale = np.concatenate(parts, -1).repeat(GROUP // 2, -1)
    return data, *_meaning(codes, scale, np.zeros((*scale.shape[:-1], 1)))


def _by_row(x: Array) -> Array:
    """(tiles, groups, 16) -> (tiles, 16, groups, 1)"""
    found: Array = x.astype(float).transpose(0, 2, 1)[..., None]
    return found


def _meaning(codes: Array, scale: Array, minimum: Array) -> tuple[Array, Array]:
    """Return the weights (rows, columns), and the magnitudes of their parts."""
    scaled, shape = scale * codes, (codes.shape[0] * TILE, codes.shape[2] * GROUP)
    return (scaled + minimum).reshape(shape), (np.abs(scaled) + np.abs(minimum)).reshape(shape)


def _int8_codes(data: Array) -> Array:
    """Bytes of blocks -> (tiles, 16, groups, 32)"""
    tiles, groups, _ = data.shape
    pairs = data.view(np.int8).reshape(tiles, groups, GROUP // 2, TILE, 2)
    return pairs.transpose(0, 3, 1, 2, 4).reshape(tiles, TILE, groups, GROUP)


def _int4_codes(data: Array) -> Array:
    tiles, groups, _ = data.shape
    halves = np.ascontiguousarray(data).view("<u2").reshape(tiles, groups, 4, TILE, 2)
    nibbles = halves[..., None] >> np.array([0, 4, 8, 12], np.uint16) & 15  # (tile, group, i, row, half, j)
    return nibbles.transpose(0, 3, 1, 2, 5, 4).reshape(tiles, TILE, groups, GROUP).astype(np.int8)


def _to_bfloat16(x: Array) -> Array:
    """Round to nearest, ties to even; return the bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _from_bfloat16(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class NumberFormat:
    """A format of numbers of 16 or 32 bits."""

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]


NUMBERS = {
    BFLOAT16: NumberFormat(_to_bfloat16, _from_bfloat16),
    FLOAT16: NumberFormat(lambda x: x.astype(np.float16), lambda x: x),
    FLOAT32: NumberFormat(lambda x: x.astype(np.float32), lambda x: x),
}


def encode(kind: int, x: Array) -> Array:
    """Return numbers in the stored format."""
    return NUMBERS[kind].encode(x)


def decode(kind: int, data: Array) -> Array:
    """Return stored numbers in float64."""
    return NUMBERS[kind].decode(data).astype(np.float64)


def store(kind: int, x: Bounded) -> Bounded:
    """Return rows as cached. A number close to the middle of two representable ones may become either."""
    low, middle, high = (
        decode(kind, encode(kind, each.astype(np.float32))) for each in (x.value - x.error, x.value, x.value + x.error)
    )
    own = x.error if kind == FLOAT32 else np.zeros_like(x.error)
    error = np.maximum(np.abs(high - middle), np.abs(low - middle))
    sure = np.isfinite(middle) & (low == high) & (kind != FLOAT32)
    return Bounded(middle, np.where(sure, 0.0, np.where(np.isfinite(middle), np.fmax(error, own), 0.0)))
