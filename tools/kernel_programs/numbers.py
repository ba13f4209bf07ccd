"""Random numbers: ordinary ones, as in chats, and outliers, subnormal numbers, infinities, and NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FLAVORS = {"plain": 12, "outliers": 3, "zeros": 1, "subnormal": 1, "large": 1, "special": 2}
"""Kinds of random numbers, and how often each is drawn."""
SPECIAL = (np.nan, -np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-40, -0.0)


@dataclass
class Draw:
    """The random choices of one program, which its seed and number determine."""

    choose: random.Random
    arrays: np.random.Generator
    wild: bool = True
    """Whether unusual numbers may occur."""

    @classmethod
    def of(cls, seed: int, number: int) -> Draw:
        """Return the choices of program `number` of a seed."""
        choose = random.Random(f"{seed}/{number}")
        return cls(choose, np.random.default_rng([seed, number]), choose.random() < 0.4)

    def chance(self, share: float) -> bool:
        """Return True with this probability."""
        return self.choose.random() < share

    def size(self, *usual: int, most: int = 0) -> int:
        """Return one of the usual sizes, or any size from 1 to `most`."""
        if most and self.chance(0.5):
            return self.choose.randint(1, most)
        return self.choose.choice(usual)

    def numbers(self, *shape: int, scale: float = 1.0) -> Array:
        """Return float32 numbers of a random flavor."""
        flavor = self.choose.choices(list(FLAVORS), list(FLAVORS.values()))[0] if self.wild else "plain"
        found: Array = scale * self.arrays.standard_normal(shape, dtype=np.float32)
        if not found.size or flavor == "plain":
            return found.astype(np.float32)
        flavored: Array = _FLAVORED[flavor](self, found)
        return flavored.astype(np.float32)

    def plain(self, *shape: int, scale: float = 1.0) -> Array:
        """Return normally distributed float32 numbers."""
        found: Array = scale * self.arrays.standard_normal(shape, dtype=np.float32)
        return found.astype(np.float32)

    def at_some(self, x: Array, values: Any) -> Array:
        """Replace up to three elements."""
        x = x.copy()
        for _ in range(self.choose.randint(1, 3)):
            x.flat[self.choose.randrange(x.size)] = self.choose.choice(values)
        return x


_FLAVORED: dict[str, Any] = {
    "outliers": lambda draw, x: draw.at_some(x, (300.0, -4e4, 1e6)),
    "zeros": lambda draw, x: draw.at_some(np.zeros_like(x), (0.0, 1.0)),
    "subnormal": lambda draw, x: x * np.float32(1e-39),
    "large": lambda draw, x: x * np.float32(10.0 ** draw.choose.randint(4, 25)),
    "special": lambda draw, x: draw.at_some(x, SPECIAL),
}
