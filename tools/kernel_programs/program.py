"""A random program with its expected results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import Operation
from tools.kernel_programs.bounded import Bounded, difference
from tools.kernel_programs.memory import Memory
from tools.kernel_programs.numbers import Draw

Array = NDArray[Any]
Check = Callable[[dict[int, Array]], str]
"""Takes the results by number of their region; returns what is wrong, or ''."""


@dataclass
class Row:
    """The result of an operation, which the next one may read: its address and its expected value."""

    address: int
    value: Bounded
    """(count, width)"""


@dataclass
class Program:
    """Operations, their memory, and checks of their results."""

    draw: Draw
    memory: Memory
    operations: list[Operation] = field(default_factory=list)
    checks: list[tuple[str, Check]] = field(default_factory=list)

    def expect(self, what: str, number: int, expected: Bounded, width: int | None = None) -> None:
        """Expect results in a region (..., stride), in which `width` elements of the last dimension are written."""

        def check(found: dict[int, Array]) -> str:
            rows = found[number]
            used, gap = (rows, rows[..., :0]) if width is None else (rows[..., :width], rows[..., width:])
            if gap.size and (np.ascontiguousarray(gap).view(np.uint8) != 0xFF).any():
                return "wrote between rows"
            return difference(used.astype(np.float64), expected)

        self.checks.append((what, check))

    def require(self, what: str, check: Check) -> None:
        """Add a check."""
        self.checks.append((what, check))

    def faults(self, found: dict[int, Array]) -> list[str]:
        """Return the faults of the results."""
        told = ((what, check(found)) for what, check in self.checks)
        return [f"{what}: {why}" for what, why in told if why]
