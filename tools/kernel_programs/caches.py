"""Cached keys and values in every format of the kernels: numbers, and codes with a scale for each head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels import operations
from tools.kernel_programs.bounded import EPS, Bounded
from tools.kernel_programs.formats import NUMBERS, decode, encode, store
from tools.kernel_programs.memory import Memory

Array = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Keys or values as stored: the rows (heads, slots, elements) and, for codes, their scales (heads, slots)."""

    arrays: list[Array]

    def share(self, memory: Memory) -> list[tuple[int, int]]:
        """Return addresses and numbers of copies that the kernels write to."""
        return [memory.share(each) for each in self.arrays]

    def members(self, name: str, shared: list[tuple[int, int]], first: int) -> dict[str, Any]:
        """Return the members of an attention for these `key` or `value` rows, from slot `first` on."""
        rows = self.arrays[0]
        each = rows.shape[2] * rows.itemsize
        found = {f"{name}s": shared[0][0] + first * each, "head_stride_bytes": rows.shape[1] * each}
        if name == "value":
            del found["head_stride_bytes"]  # that of the keys
        for address, _ in shared[1:]:
            found[f"{name}_scales"] = address + 2 * first
            if name == "key":
                found["scale_stride"] = rows.shape[1]
        return found


class Cache(Protocol):
    """A format of cached keys and values."""

    @property
    def unit(self) -> int:
        """Number of which the width of a head must be a multiple."""

    def encode(self, x: Array) -> Rows:
        """Return rows (heads, slots, dim) in float32 as stored."""

    def decode(self, rows: Rows) -> Array:
        """Return the numbers in float64."""

    def store(self, x: Bounded) -> Bounded:
        """Return new rows as they are cached."""

    def queried(self, query: Bounded) -> Bounded:
        """Return queries as they are before they are multiplied with keys."""

    def share_error(self, shares: Array, values: Array) -> Array | float:
        """Return the error of sums of values (heads, slots, dim) by rounding their shares (heads, rows, slots)."""


@dataclass(frozen=True)
class Plain:
    """Numbers of 16 or 32 bits."""

    kind: int
    unit: int = 1

    def encode(self, x: Array) -> Rows:
        return Rows([encode(self.kind, x)])

    def decode(self, rows: Rows) -> Array:
        return decode(self.kind, rows.arrays[0])

    def store(self, x: Bounded) -> Bounded:
        return store(self.kind, x)

    def queried(self, query: Bounded) -> Bounded:
        return query

    def share_error(self, shares: Array, values: Array) -> float:
        return 0.0


@dataclass(frozen=True)
class Coded:
    """Codes of 8 or 4 bits of a head multiplied by a Hadamard matrix, and a bfloat16 scale."""

    limit: int
    """Largest code."""
    unit: int

    def encode(self, x: Array) -> Rows:
        turned = _turned(x.astype(float))
        scales = _rounded_up(np.abs(turned).max(-1, initial=0.0) / self.limit)
        return self._packed(self._codes(turned, scales), scales)

    def decode(self, rows: Rows) -> Array:
        codes, scales = rows.arrays
        if self.limit < 8:
            codes = np.concatenate([codes & 15, codes >> 4], -1).astype(np.int8) - 8
        return _turned(codes * _scale(scales)[..., None])

    def store(self, x: Bounded) -> Bounded:
        part, dim = _part(x.value.shape[-1]), x.value.shape[-1]
        turned, size = _turned(x.value), np.abs(x.value).sum(-1, keepdims=True)
        doubt = (x.error.sum(-1, keepdims=True) + 8 * EPS * size) / math.sqrt(part)
        most = np.abs(turned).max(-1, initial=0.0)
        low, high = (_rounded_up(np.maximum(most + sign * doubt[..., 0], 0) / self.limit) for sign in (-1, 1))
        scale = _scale(high)[..., None]
        codes = [self._codes(turned + sign * doubt, high) for sign in (-1.0, 0.0, 1.0)]
        steps = np.abs(codes[2].astype(float) - codes[0]) * scale
        error = np.where((low != high)[..., None], np.inf, steps)
        error = np.broadcast_to(error.sum(-1, keepdims=True) / math.sqrt(part), x.value.shape)
        value = _turned(codes[1] * scale)
        is_odd, has_scale = ~np.isfinite(x.value).all(-1, keepdims=True), np.isfinite(scale)
        value = np.where(is_odd, np.nan, np.where(has_scale, value, x.value))
        rounding = 16 * EPS * np.linalg.norm(value, axis=-1, keepdims=True)
        error = np.where(np.isnan(error) | is_odd | ~has_scale, np.inf, error + rounding)
        return Bounded(value, error + 1e-30 * dim)

    def queried(self, query: Bounded) -> Bounded:
        """Queries are multiplied by the matrix, and rounded to 16-bit integers."""
        most = np.abs(query.value).sum(-1, keepdims=True) / math.sqrt(_part(query.value.shape[-1]))
        return Bounded(query.value, query.error + most * math.sqrt(query.value.shape[-1]) / 32767)

    def share_error(self, shares: Array, values: Array) -> Array:
        """Shares times scales are rounded to 16-bit integers, up to the largest of them; then they multiply codes."""
        scales = np.abs(_turned(values)).max(-1, initial=0.0) / self.limit
        codes = np.divide(np.abs(values), scales[..., None], out=np.zeros_like(values), where=scales[..., None] > 0)
        largest = (shares * scales[:, None]).max(-1, keepdims=True, initial=0.0)
        turning = 16 * EPS * (shares * np.linalg.norm(values, axis=-1)[:, None]).sum(-1, keepdims=True)
        return np.asarray(0.53 / 32767 * largest * codes.sum(1, keepdims=True) + turning)

    def _codes(self, turned: Array, scales: Array) -> Array:
        scale = _scale(scales)[..., None]
        codes = np.rint(np.where((scale > 0) & np.isfinite(scale), turned / scale, 0.0))
        return np.nan_to_num(codes).astype(np.int8)

    def _packed(self, codes: Array, scales: Array) -> Rows:
        if self.limit < 8:
            low, high = np.split((codes + 8).astype(np.uint8), 2, -1)
            codes = low | high << 4
        return Rows([np.ascontiguousarray(codes), scales])


def _part(dim: int) -> int:
    return dim & -dim


def _turned(x: Array) -> Array:
    """Return `x` (..., dim) times a Hadamard matrix, in parts of the largest power of two that divides dim."""
    matrix = np.ones((1, 1))
    while len(matrix) < _part(x.shape[-1]):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // len(matrix), len(matrix)) @ (matrix / math.sqrt(len(matrix)))
    return np.asarray(parts.reshape(x.shape))


def _scale(bits: Array) -> Array:
    return decode(operations.BFLOAT16, bits)


def _rounded_up(x: Array) -> Array:
    """Return the bits of the smallest bfloat16 that is not below `x` >= 0; 0 for numbers near 0."""
    bits = (x.astype(np.float32).view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16
    found = np.where(np.isnan(x), 0x7FC0, np.minimum(bits, 0x7F80))
    return np.where(x < 1e-30 / 127, 0, found).astype(np.uint16)


CACHES: dict[int, Cache] = {kind: Plain(kind) for kind in NUMBERS}
"""All formats; one with codes only if the kernels have it. A new format joins here."""
CACHES |= {
    getattr(operations, name): cache
    for name, cache in {"INT8": Coded(127, 1), "INT4": Coded(7, 2)}.items()
    if hasattr(operations, name)
}
