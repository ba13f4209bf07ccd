"""Formats of cached keys and values: numbers, and codes with a scale for each head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from streamchat.kernels.operations import INT4, INT8, K8V4
from tools.kernel_programs.bounded import Bounded
from tools.kernel_programs.coded import SEARCHED, Coded
from tools.kernel_programs.formats import NUMBERS, decode, encode, store
from tools.kernel_programs.rows import Choices, Rows

Array = NDArray[Any]


class Cache(Protocol):
    """A format of cached keys or values."""

    @property
    def unit(self) -> int:
        """Number of which the width of a head must be a multiple."""

    def encode(self, x: Array) -> Rows:
        """Return rows (heads, slots, dim) in float32 as stored."""

    def decode(self, rows: Rows) -> Array:
        """Return the numbers in float64."""

    def loaded(self, rows: Rows) -> Bounded:
        """Return the numbers as the kernels read them."""

    def choices(self, x: Bounded) -> Choices:
        """Return what new rows may be cached as."""

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

    def loaded(self, rows: Rows) -> Bounded:
        return Bounded.of(self.decode(rows))

    def choices(self, x: Bounded) -> Choices:
        return Choices.only(store(self.kind, x))

    def queried(self, query: Bounded) -> Bounded:
        return query

    def share_error(self, shares: Array, values: Array) -> float:
        return 0.0


@dataclass(frozen=True)
class Pair:
    """The formats of keys and values."""

    keys: Cache
    values: Cache

    @property
    def unit(self) -> int:
        return math.lcm(self.keys.unit, self.values.unit)


_CODES = {INT8: (127, 1), INT4: (7, 2)}


def one_cache(kind: int, searches: bool = False) -> Cache:
    """Return a format of keys or values.

    Args:
        kind: A format of numbers or codes.
        searches: Codes have the best of several scales.
    """
    if kind in NUMBERS:
        return Plain(kind)
    return Coded(*_CODES[kind], SEARCHED) if searches else Coded(*_CODES[kind])


SINGLE = (*NUMBERS, *_CODES)
"""Formats of keys or values."""
CACHES = {kind: Pair(one_cache(kind), one_cache(kind)) for kind in SINGLE}
"""Formats of keys and values by their number. A new format joins here."""
CACHES[K8V4] = Pair(one_cache(INT8), one_cache(INT4, searches=True))
