"""Rows of cached keys and values, and what a kernel may store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.kernel_programs import bounded
from tools.kernel_programs.bounded import Bounded
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


@dataclass(frozen=True)
class Choices:
    """Numbers that heads may be stored as. All numbers of a head must be those of the same choice."""

    each: Bounded
    """(choices, heads, slots, dim)"""
    is_allowed: Array
    """(choices, heads, slots)"""

    @classmethod
    def only(cls, x: Bounded) -> Choices:
        """Return the one choice `x`, (heads, slots, dim)."""
        return cls(x.map(lambda part: part[None]), np.ones((1, *x.value.shape[:-1]), bool))

    def bounds(self) -> Bounded:
        """Return bounds that all choices are within, (heads, slots, dim)."""
        if len(self.is_allowed) == 1:
            return self.each[0]
        value = self._first()
        error = np.abs(self.each.value - value) + self.each.error
        error = np.where(np.isnan(error), np.inf, error)
        return Bounded(value, np.where(self.is_allowed[..., None], error, 0.0).max(0))

    def difference(self, found: Array) -> str:
        """Return what is wrong with `found`, (heads, slots, dim); '' if nothing is."""
        good = self.is_allowed & bounded.matches(found, self.each).all(-1)
        wrong = np.argwhere(~good.any(0))
        if not len(wrong):
            return ""
        head, slot = (int(i) for i in wrong[0])
        allowed = int(self.is_allowed[:, head, slot].sum())
        near = Bounded(self._first()[head, slot], self.each.error[self.is_allowed.argmax(0)[head, slot], head, slot])
        what = bounded.difference(found[head, slot], near)
        return f"head {head}, slot {slot} is none of {allowed} choices: {what}; {len(wrong)} heads differ"

    def _first(self) -> Array:
        """Return the first choice that is allowed."""
        at = self.is_allowed.argmax(0)[None, ..., None]
        return np.asarray(np.take_along_axis(self.each.value, at, 0)[0])
