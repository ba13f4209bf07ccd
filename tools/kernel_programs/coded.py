"""Heads in codes of 8 or 4 bits, as the comments in `source/codes.h` describe them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import BFLOAT16
from tools.kernel_programs.bounded import EPS, FLOOR, LARGE, TINY, Bounded, sum_error
from tools.kernel_programs.formats import decode
from tools.kernel_programs.rows import Choices, Rows

Array = NDArray[Any]
SEARCHED = (1.0, 0.9, 0.8, 0.7)
"""Scales from which the best is taken, as shares of that of the largest number."""
MOST = 3e38
"""Heads with a larger norm may overflow when they are multiplied by a Hadamard matrix: no partial sum is larger."""
LEAST = 1e-30
"""Heads, queries, and shares whose numbers are all smaller become 0."""


@dataclass(frozen=True)
class Coded:
    """Codes of 8 or 4 bits of a head multiplied by a Hadamard matrix, and a bfloat16 scale."""

    limit: int
    """Largest code; the smallest one is -limit - 1."""
    unit: int
    shares: tuple[float, ...] = SEARCHED[:1]

    def encode(self, x: Array) -> Rows:
        """Clips some numbers if the kernels may do so."""
        turned = _turned(x.astype(float))
        scales = _rounded_up(np.abs(turned).max(-1, initial=0.0), self._factor(self.shares[-1]))
        return self.packed(self._codes(turned, scales), scales)

    def packed(self, codes: Array, scales: Array) -> Rows:
        """Return codes (heads, slots, dim) and their scales as stored."""
        if self.limit < 8:
            low, high = np.split((codes + 8).astype(np.uint8), 2, -1)
            codes = low | high << 4
        return Rows([np.ascontiguousarray(codes), scales])

    def decode(self, rows: Rows) -> Array:
        return _turned(self._still_turned(rows))

    def loaded(self, rows: Rows) -> Bounded:
        turned = self._still_turned(rows)
        size = np.abs(turned).sum(-1, keepdims=True) / math.sqrt(_part(turned.shape[-1]))
        error = np.where(np.isfinite(size), 10 * EPS * size, 0.0) + TINY
        error = np.where(size > LARGE, np.inf, error)
        return Bounded(_turned(turned), np.broadcast_to(error, turned.shape))

    def choices(self, x: Bounded) -> Choices:
        part = _part(x.value.shape[-1])
        turned, size = _turned(x.value), np.abs(x.value).sum(-1, keepdims=True)
        doubt = (x.error.sum(-1, keepdims=True) + 8 * EPS * size) / math.sqrt(part)
        each, best, least = [], np.full(turned.shape[:-1], np.inf), []
        for share in self.shares:
            highest = np.zeros(turned.shape[:-1])
            for scales, is_sure in _scales(turned, doubt, self._factor(share)):
                found, low, high = self._choice(x, turned, doubt, scales, is_sure)
                each.append(found)
                least.append(low)
                highest = np.maximum(highest, high)
            best = np.minimum(best, highest)
        both = Bounded(np.stack([one.value for one in each]), np.stack([one.error for one in each]))
        return Choices(both, ~(np.stack(least) > best))

    def queried(self, query: Bounded) -> Bounded:
        """Queries are multiplied by the matrix, and rounded to 16-bit integers."""
        most = np.abs(query.value).sum(-1, keepdims=True) / math.sqrt(_part(query.value.shape[-1]))
        off = (most / 32767 + np.minimum(most, 1.01 * LEAST)) * math.sqrt(query.value.shape[-1])
        return Bounded(query.value, query.error + off)

    def share_error(self, shares: Array, values: Array) -> Array:
        """Shares times scales are rounded to 16-bit integers, up to the largest of them; then they multiply codes."""
        scales = np.abs(_turned(values)).max(-1, initial=0.0) / self.limit
        codes = np.divide(np.abs(values), scales[..., None], out=np.zeros_like(values), where=scales[..., None] > 0)
        if len(self.shares) > 1:
            codes *= (self.limit + 1) / self.limit  # the largest code may be that
        largest = (shares * scales[:, None]).max(-1, keepdims=True, initial=0.0)
        norms = np.linalg.norm(values, axis=-1)[:, None]
        most = ((shares > 0) * norms).sum(-1, keepdims=True)  # shares are divided by their sum at the end
        turning = np.where(most > MOST, np.inf, 16 * EPS * ((shares + FLOOR) * norms).sum(-1, keepdims=True))
        off = 0.53 / 32767 * largest + np.minimum(largest, 1.01 * LEAST)
        return np.asarray(off * codes.sum(1, keepdims=True) + turning)

    def _choice(
        self, x: Bounded, turned: Array, doubt: Array, scales: Array, is_sure: Array
    ) -> tuple[Bounded, Array, Array]:
        """Return heads stored with these scales, and bounds of their squared errors, (heads, slots)."""
        part, dim, scale = _part(x.value.shape[-1]), x.value.shape[-1], _scale(scales)[..., None]
        codes = [self._codes(turned + sign * doubt, scales) for sign in (-1.0, 0.0, 1.0)]
        steps = np.abs(codes[2].astype(float) - codes[0]) * scale
        error = np.where(is_sure[..., None], steps, np.inf)
        error = np.broadcast_to(error.sum(-1, keepdims=True) / math.sqrt(part), x.value.shape)
        value = _turned(codes[1] * scale)
        is_odd, has_scale = ~np.isfinite(x.value).all(-1, keepdims=True), np.isfinite(scale)
        value = np.where(is_odd, np.nan, np.where(has_scale, value, x.value))
        rounding = 16 * EPS * np.linalg.norm(value, axis=-1, keepdims=True)
        error = np.where(np.isnan(error) | is_odd | ~has_scale, np.inf, error + rounding)
        off = [np.abs(turned - scale * each) for each in codes]
        own = doubt + 2 * EPS * np.abs(turned)
        low = (np.maximum(np.minimum.reduce(off) - own, 0.0) ** 2).sum(-1) * (1 - sum_error(dim)) - dim * TINY
        high = ((np.maximum.reduce(off) + own) ** 2).sum(-1) * (1 + sum_error(dim)) + dim * TINY
        return Bounded(value, error + LEAST * dim), low, np.where(high < LARGE, high, np.inf)

    def _factor(self, share: float) -> float:
        """Return the scale of a head as a share of its largest number; the kernels have `share` in float32."""
        return float(np.float32(share)) / self.limit

    def _codes(self, turned: Array, scales: Array) -> Array:
        scale = _scale(scales)[..., None]
        codes = np.rint(np.where((scale > 0) & np.isfinite(scale), turned / scale, 0.0))
        return np.asarray(np.clip(np.nan_to_num(codes), -self.limit - 1, self.limit), np.int8)

    def _still_turned(self, rows: Rows) -> Array:
        codes, scales = rows.arrays
        if self.limit < 8:
            codes = np.concatenate([codes & 15, codes >> 4], -1).astype(np.int8) - 8
        return np.asarray(codes * _scale(scales)[..., None])


def _scales(turned: Array, doubt: Array, factor: float) -> Iterator[tuple[Array, Array]]:
    """Yield the bits of the scales that heads may get, and whether these are all.

    Args:
        turned: The heads.
        doubt: Error of their numbers.
        factor: The scale of a head, as a share of its largest number.
    """
    most = np.abs(turned).max(-1, initial=0.0)
    low, high = (_rounded_up(np.maximum(most + sign * doubt[..., 0], 0), factor) for sign in (-1, 1))
    is_sure = high.astype(int) - low <= 1
    yield high, is_sure
    if (low != high).any():
        yield low, is_sure


def _part(dim: int) -> int:
    return dim & -dim


@cache
def _hadamard(size: int) -> Array:
    """Return the orthogonal Hadamard matrix."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def _turned(x: Array) -> Array:
    """Return `x` (..., dim) times a Hadamard matrix, in parts of the largest power of two that divides dim."""
    matrix = _hadamard(_part(x.shape[-1]))
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // len(matrix), len(matrix)) @ matrix
    return np.asarray(parts.reshape(x.shape))


def _scale(bits: Array) -> Array:
    return decode(BFLOAT16, bits)


def _rounded_up(most: Array, factor: float) -> Array:
    """Return the bits of the smallest bfloat16 that is not below `most` >= 0 times a factor; 0 for numbers near 0."""
    x = most * factor
    bits = (x.astype(np.float32).view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16
    found = np.where(np.isnan(x), 0x7FC0, np.minimum(bits, 0x7F80))
    return np.where(most < LEAST, 0, found).astype(np.uint16)
