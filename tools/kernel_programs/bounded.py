"""Arrays in float64 with bounds on the difference of the kernels' float32 results from them.

If a bound is `inf`, any result is accepted. If a value is not finite, the result of the kernels must not be finite
either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import GELU, GELU_TANH, NO_FUNCTION, RELU, RELU2, SILU, SOFTCAP

Array = NDArray[Any]
EPS = 2.0**-24
"""Relative error of one rounded operation."""
TINY = 1e-42
"""Absolute error where results are subnormal."""
FLOOR = 2.0**-125
"""Shares of the softmax are never smaller than half of this, not even those of slots that are not seen."""
LARGE = 1e37
"""Sums of magnitudes above this may overflow."""


@dataclass(frozen=True)
class Bounded:
    """Values and their error bounds, of the same shape."""

    value: Array
    error: Array

    @classmethod
    def of(cls, array: Array) -> Bounded:
        """Return exact numbers."""
        return cls(array.astype(np.float64), np.zeros(array.shape))

    def __getitem__(self, at: Any) -> Bounded:
        return Bounded(self.value[at], self.error[at])

    def reshape(self, *shape: int) -> Bounded:
        """Return the same numbers in another shape."""
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def map(self, function: Callable[[Array], Array]) -> Bounded:
        """Apply a function that only moves numbers to values and errors."""
        return Bounded(function(self.value), function(self.error))


def bound(value: Array, error: Array) -> Bounded:
    """Return the numbers; if they may overflow, any result is accepted."""
    error = np.where(np.isnan(error), np.inf, error) + TINY
    finite = np.isfinite(value)
    return Bounded(value, np.where(finite & (np.abs(value) + error > LARGE), np.inf, error))


def add(a: Bounded, b: Bounded, scale: float = 1.0) -> Bounded:
    """Return a + scale * b."""
    value, size = a.value + scale * b.value, np.abs(a.value) + abs(scale) * np.abs(b.value)
    return bound(value, a.error + abs(scale) * b.error + 2 * EPS * size)


def multiply(a: Bounded, b: Bounded) -> Bounded:
    """Return a * b."""
    value = a.value * b.value
    error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
    return bound(value, error + EPS * np.abs(value))


def sum_error(count: int) -> float:
    """Return the relative error of a sum of `count` products, in any order, as a share of the sum of magnitudes."""
    return (8 + 2 * math.sqrt(count)) * EPS


def total_error(terms: Array) -> Array:
    """Return the error of the sums of terms (..., count) that are not negative, in any order: (..., 1).

    If one term dominates, the others may be about equal and below a unit in the last place of the sum, and then all of
    them are rounded in the same direction. So LayerNorm's squares are, if one of thousands of numbers is huge.
    """
    total = terms.sum(-1, keepdims=True)
    error = sum_error(max(1, terms.shape[-1])) * total
    worst = np.minimum(terms, EPS * total).sum(-1, keepdims=True)
    is_dominated = terms.max(-1, keepdims=True, initial=0) > total / 8
    found: Array = np.where(is_dominated, np.maximum(error, worst), error)
    return found


def dot(x: Bounded, weights: Array, sizes: Array | None = None, rounding: Array | None = None) -> Bounded:
    """Return x (n, columns) times weights (rows, columns), transposed.

    Args:
        x: The vectors.
        weights: The matrix.
        sizes: Sum of the magnitudes of the parts of each weight, if larger than the weights.
        rounding: Error of each element of `x` from rounding to integers.
    """
    sizes = np.abs(weights) if sizes is None else sizes
    value = x.value @ weights.T
    total = np.abs(x.value) @ sizes.T
    more = x.error if rounding is None else x.error + rounding
    error = more @ sizes.T + sum_error(weights.shape[1]) * total
    return bound(value, np.where(np.isfinite(value) & ~(total < LARGE), np.inf, error))


def normalize(x: Bounded, weight: Array, bias: Array | None, eps: float, is_layer_norm: bool) -> Bounded:
    """Return the norm of rows (n, width)."""
    width = max(1, x.value.shape[-1])
    mean = mean_error = np.zeros((*x.value.shape[:-1], 1))
    if is_layer_norm and x.value.shape[-1]:
        mean = x.value.mean(-1, keepdims=True)
        mean_error = x.error.mean(-1, keepdims=True) + total_error(np.abs(x.value)) / width
    centered = x.value - mean
    error = x.error + mean_error + EPS * (np.abs(x.value) + np.abs(mean)) + 2.0**-147
    squares = centered**2
    doubt = (2 * np.abs(centered) * error + error**2).sum(-1, keepdims=True) / width + total_error(squares) / width
    variance = squares.sum(-1, keepdims=True) / width + np.float32(eps)
    relative = np.where(doubt < 0.5 * variance, doubt / variance, np.inf) + 8 * EPS
    scale = 1 / np.sqrt(variance)
    value = centered * scale * weight + (0 if bias is None else bias)
    plain = np.abs(centered * scale * weight)
    error = np.abs(weight) * scale * error * (1 + np.minimum(relative, 1)) + plain * relative
    error = error + 4 * EPS * (plain + (0 if bias is None else np.abs(bias)))
    # the three factors are multiplied in any order: the product of two may be subnormal, or overflow
    error = error + 2.0**-148 * (np.abs(centered) + scale + np.abs(weight))
    risky = (variance * width > LARGE) | ~np.isfinite(variance)
    risky = risky | (np.abs(weight) * np.maximum(scale, np.abs(centered)) > LARGE)
    return bound(value, np.where(risky & np.isfinite(value), np.inf, error))


def activate(function: int, x: Bounded, softcap: float) -> Bounded:
    """Return an activation, with the errors that `source/common.h` and `rows.c` state."""
    value, size = _FUNCTIONS[function](x.value, softcap), np.abs(x.value)
    size = np.where(np.isfinite(size), size, 0.0)
    slope: Any = 2 * size + x.error if function == RELU2 else 1.2
    if function in (RELU, RELU2, SOFTCAP):  # which of them: a sum with infinities may be either, or NaN
        x = Bounded(np.where(np.isfinite(x.value), x.value, 0.0), np.where(np.isfinite(x.value), x.error, np.inf))
        value = _FUNCTIONS[function](x.value, softcap)
    own = {NO_FUNCTION: 0.0, RELU: 0.0, RELU2: EPS * size**2, SOFTCAP: 2e-6 * softcap}.get(function)
    own = 2e-6 * size if own is None else own
    return bound(value, slope * x.error + own + EPS * np.abs(np.where(np.isfinite(value), value, 0.0)))


def _sigmoid(x: Array) -> Array:
    power = np.exp(-np.abs(x))
    found: Array = np.where(x < 0, power, 1.0) / (1 + power)
    return found


def _gelu_tanh(x: Array) -> Array:
    found: Array = x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return found


_erfc = np.vectorize(math.erfc, otypes=[float])
_FUNCTIONS: dict[int, Callable[[Array, float], Array]] = {
    NO_FUNCTION: lambda x, _: x,
    SILU: lambda x, _: x * _sigmoid(x),
    GELU: lambda x, _: x * 0.5 * _erfc(-x / math.sqrt(2)),
    GELU_TANH: lambda x, _: _gelu_tanh(x),
    RELU: lambda x, _: np.where(x < 0, 0.0, x),
    RELU2: lambda x, _: np.where(x < 0, 0.0, x) ** 2,
    SOFTCAP: lambda x, cap: cap * np.tanh(x / cap),
}


def sigmoid(x: Bounded) -> Bounded:
    """Return 1 / (1 + exp(-x))."""
    return bound(_sigmoid(x.value), x.error / 4 + 4e-6)


def matches(found: Array, expected: Bounded) -> Array:
    """Return which elements of `found` are within the bounds."""
    value, error = expected.value, expected.error
    finite = np.isfinite(value)
    with np.errstate(invalid="ignore"):
        close = np.where(finite, np.abs(found - value) <= error, ~np.isfinite(found))
    good: Array = close | (np.isinf(error) & finite)
    return good


def difference(found: Array, expected: Bounded) -> str:
    """Return what is wrong with `found`; '' if nothing is."""
    good = matches(found, expected)
    if good.all():
        return ""
    at = tuple(int(i) for i in np.argwhere(~good)[0])
    what = f"{found[at]!r} at {list(at)}, expected {expected.value[at]!r}, error at most {expected.error[at]:.3g}"
    return f"{what}; {int((~good).sum())} of {good.size} differ"


def rotate(x: Bounded, cos: Array, sin: Array, is_interleaved: bool) -> Bounded:
    """Return `x` with all elements (..., width) rotated, by halves or in pairs of neighbors.

    Args:
        x: The elements.
        cos: Cosines, for each element.
        sin: Sines, for each element.
        is_interleaved: Whether the pairs are neighbors.
    """
    width = x.value.shape[-1]
    partner = x.map(lambda part: _partners(part, is_interleaved))
    signs = np.tile([-1.0, 1.0], width // 2) if is_interleaved else np.repeat([-1.0, 1.0], width // 2)
    value = x.value * cos + partner.value * signs * sin
    error = x.error * np.abs(cos) + partner.error * np.abs(sin)
    return bound(value, error + 3 * EPS * (np.abs(x.value * cos) + np.abs(partner.value * sin)))


def _partners(x: Array, is_interleaved: bool) -> Array:
    """Return for each element the one that it is rotated with."""
    if is_interleaved:
        return np.stack([x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    half = x.shape[-1] // 2
    return np.concatenate([x[..., half:], x[..., :half]], -1)
