"""Keys and values in 8 or 4 bits, as `source/codes.h` describes them, in NumPy. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamchat.kernels.check_matrices import Array, noise, stored, values
from streamchat.kernels.operations import INT4, INT8, K8V4


@dataclass(frozen=True)
class CachedPair:
    """Keys and values in a format of the kernels."""

    data: tuple[Array, Array]
    """(heads, slots, ...) each: numbers, or codes."""
    scales: Array | None
    """(2, heads, slots): bfloat16 bits of the scales."""

    def numbers(self) -> Array:
        """Return what they represent, (2, heads, slots, dim)."""
        if self.scales is None:
            return values(np.stack(self.data))
        codes = [
            np.concatenate([each & 15, each >> 4], -1).astype(np.int8) - 8 if each.dtype == np.uint8 else each
            for each in self.data
        ]
        return turned(np.stack(codes) * values(self.scales)[..., None])

    def limits(self) -> Array:
        """Return the largest number of each turned head that its scale represents, (2, heads, slots)."""
        assert self.scales is not None
        sizes: Array = np.array([7 if each.dtype == np.uint8 else 127 for each in self.data])
        return sizes[:, None, None] * values(self.scales)

    def step(self) -> Array:
        """Return the largest accepted error of a head, (2, heads, slots, 1): 0.4 codes per dimension; 0.29 is usual."""
        assert self.scales is not None
        dim = self.data[0].shape[-1] * (2 if self.data[0].dtype == np.uint8 else 1)
        size: Array = values(self.scales)[..., None] * 0.4 * np.sqrt(dim)
        return size


def random_pair(kind: int, heads: int, slots: int, dim: int, value_size: float) -> CachedPair:
    """Return random keys and values in the format `kind`."""
    numbers = noise(2, heads, slots, dim)
    numbers[1] *= value_size
    if kind not in (INT8, INT4, K8V4):
        both = stored(numbers, kind)
        return CachedPair((both[0], both[1]), None)
    of_keys, of_values = (INT8, INT4) if kind == K8V4 else (kind, kind)
    (keys, key_scales), (rows, value_scales) = _codes(numbers[0], of_keys), _codes(numbers[1], of_values)
    return CachedPair((keys, rows), np.stack([key_scales, value_scales]))


def _codes(numbers: Array, kind: int) -> tuple[Array, Array]:
    """Return codes and scales of heads in the format INT8 or INT4."""
    numbers = turned(numbers)
    scales = _rounded_up(np.abs(numbers).max(-1) / (127 if kind == INT8 else 7))
    codes = np.round(numbers / values(scales)[..., None]).astype(np.int8)
    if kind == INT4:
        low, high = np.split((codes + 8).astype(np.uint8), 2, -1)
        codes = low | high << 4
    return np.ascontiguousarray(codes), scales


def turned(x: Array) -> Array:
    """Return `x` (..., dim) times a Hadamard matrix, in parts of the largest power of two that divides dim."""
    dim = x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < dim & -dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    parts: Array = x.reshape(*x.shape[:-1], -1, len(matrix)) @ (matrix / np.sqrt(len(matrix)))
    return parts.reshape(x.shape).astype(np.float32)


def _rounded_up(numbers: Array) -> Array:
    """Return the bits of the smallest bfloat16 that are not below `numbers` >= 0."""
    bits = numbers.astype(np.float32).view(np.uint32)
    return ((bits + 0xFFFF) >> 16).astype(np.uint16)
