"""Random matrices in every format of the kernels, and the weights that they represent. Needs no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    SCALE,
    SCALE_MIN,
    SUPER_16,
    SUPER_32,
    SUPERBLOCK,
    TILE,
    unit_size,
)

Array = NDArray[Any]
MATRICES = (
    (4, SCALE_MIN),
    (4, SUPER_32),
    (8, SCALE),
    (8, SCALE_MIN),
    (8, SUPER_32),
    (8, SUPER_16),
    (16, BFLOAT16),
    (16, FLOAT16),
    (32, FLOAT32),
)
"""Bits, and the number format or the kind of the scales."""
_random = np.random.default_rng(1)


def random_matrix(bits: int, rows: int, columns: int, kind: int) -> tuple[Array, Array]:
    """Return random data, and the (rows, columns) weights that it represents."""
    if bits < 16:
        data, weights = _tiles(bits, kind, -(-rows // TILE), columns)
        return data, weights[:rows]
    data = stored(noise(rows, columns), kind)
    return data, values(data).astype(float)


def _tiles(bits: int, kind: int, tiles: int, columns: int) -> tuple[Array, Array]:
    """Return tiles as kernels/source/tiles.h describes them, and (16 * tiles, columns) weights."""
    groups = columns // 32
    largest = {SCALE: 127, SUPER_16: 32}.get(kind, 15 if bits == 4 else 31)
    least = -largest if kind in (SCALE, SUPER_16) else 0
    codes = _random.integers(least, largest + 1, (tiles, TILE, groups, 32))
    pack = _int4_bytes if bits == 4 else _int8_bytes
    parts, scale, minimum = [pack(codes)], _random_scales(kind, tiles, groups), np.zeros((tiles, TILE, groups, 1))
    factors = _halves(0.01 * (0.5 + _random.random((2, tiles, TILE, -(-groups // SUPERBLOCK)))))
    each = factors.astype(float).repeat(SUPERBLOCK, -1)
    parts += [np.ascontiguousarray(part.transpose(0, 2, 1)).view(np.uint8) for part in scale]
    first, second = (part.astype(float)[..., None] for part in (scale[0], scale[-1]))
    if kind == SCALE_MIN:
        minimum = second
    elif kind == SUPER_32:
        first, minimum = first * each[0][..., None], -second * each[1][..., None]
    elif kind == SUPER_16:
        first = np.concatenate([first, second], -1).repeat(16, -1) * each[0][..., None]
    data = np.concatenate(parts, -1)
    if kind >= SUPER_32:
        headers = [np.ascontiguousarray(part.transpose(0, 2, 1)).view(np.uint8) for part in factors]
        data = np.concatenate([*headers, data.reshape(tiles, groups // SUPERBLOCK, -1)], -1)
    assert data.shape[1:] == (columns // unit_size(bits, kind)[0], unit_size(bits, kind)[1])
    return data, (first * codes + minimum).reshape(TILE * tiles, columns)


def _random_scales(kind: int, tiles: int, groups: int) -> list[Array]:
    """Return scales, and minimums or the scales of the second half, each (tiles, 16, groups)."""
    shape = (tiles, TILE, groups)
    if kind == SUPER_16:
        return [_random.integers(-128, 128, shape).astype(np.int8) for _ in range(2)]
    if kind == SUPER_32:
        return [_random.integers(0, 64, shape).astype(np.uint8) for _ in range(2)]
    scale = _halves(0.1 * _random.random(shape))
    return [scale] if kind == SCALE else [scale, _halves(_random.random(shape) - 0.5)]


def _halves(numbers: Array) -> Array:
    halves: Array = numbers.astype(np.float16)
    return halves


def _int8_bytes(codes: Array) -> Array:
    tiles, _, groups, _ = codes.shape
    pairs = codes.reshape(tiles, TILE, groups, 16, 2).transpose(0, 2, 3, 1, 4)
    return pairs.astype(np.int8).reshape(tiles, groups, -1).view(np.uint8)


def _int4_bytes(codes: Array) -> Array:
    tiles, _, groups, _ = codes.shape
    # (tile, row, group, quarter, nibble, half): four nibbles make a 16-bit word
    nibbles = codes.reshape(tiles, TILE, groups, 4, 4, 2)
    words = (nibbles << np.array([[0], [4], [8], [12]])).sum(4).transpose(0, 2, 3, 1, 4).reshape(tiles, groups, -1)
    data: Array = words.astype("<u2").view(np.uint8)
    return data


def noise(*shape: int) -> Array:
    """Return normally distributed float32 numbers."""
    return _random.standard_normal(shape, dtype=np.float32)


def stored(numbers: Array, kind: int) -> Array:
    """Return `numbers` in a format of 16 or 32 bits, bfloat16 as its bits."""
    if kind == BFLOAT16:
        return _bfloat16(numbers)
    return numbers.astype(np.float16 if kind == FLOAT16 else np.float32)


def values(data: Array) -> Array:
    """Return what `stored` stored, in float32."""
    if data.dtype == np.uint16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def _bfloat16(numbers: Array) -> Array:
    """Round to nearest, ties to even; returns the bits."""
    bits = numbers.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
