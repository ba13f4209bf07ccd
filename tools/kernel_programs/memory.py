"""The memory of a random program, as `driver.c` reads it: regions, and structures that point to them."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import Matrix, Move, Operation, program

Array = NDArray[Any]
MAGIC = 0x4B45524E50524F47
RUN, DEQUANTIZE, WRITE_SLOTS, READ_SLOTS = range(4)
GIVEN, RETURNED, POINTERS = 1, 2, 4
AT_END, AT_START, INSIDE = range(3)
_BASE = 0x5EED << 48
"""Addresses of regions: this, the number of the region in 16 bits, and an offset in 32 bits."""


@dataclass
class Region:
    """A piece of memory of the program."""

    size: int
    flags: int
    where: int
    """Whether it is at the end or the start of its pages, next to an inaccessible page, or inside of them."""
    skew: int
    """Bytes before it in its pages, if it is inside."""
    content: bytes = b""
    dtype: Any = np.float32
    shape: tuple[int, ...] = ()
    """Shape of the returned array."""


@dataclass
class Memory:
    """Collects the regions of one program.

    Args:
        random: Chooses where regions are placed.
        threads: Threads that run the program.
    """

    random: random.Random
    threads: int = 1
    is_fresh: bool = True
    """Whether threads allocate new scratch memory of exactly the size that they request."""
    regions: list[Region] = field(default_factory=lambda: [Region(0, 0, AT_END, 0)])
    """All regions; the first one has the operations."""
    _head: tuple[int, int] = (RUN, 0)

    def give(self, array: Array | None) -> int | None:
        """Return the address of a copy of an array, if there is one; see `constant`."""
        return None if array is None else self.constant(array)

    def constant(self, array: Array) -> int:
        """Return the address of a copy of an array, which the kernels may only read."""
        return self._add(array.nbytes, GIVEN, array.itemsize, array.tobytes())

    def share(self, array: Array) -> tuple[int, int]:
        """Return address and region number of a copy of an array that the kernels also write to."""
        at = self._add(array.nbytes, GIVEN | RETURNED, array.itemsize, array.tobytes())
        return at, self._describe(array.shape, array.dtype)

    def receive(self, *shape: int, dtype: Any = np.float32) -> tuple[int, int]:
        """Return address and region number of memory that the kernels write. It is filled with NaN before."""
        each = np.dtype(dtype).itemsize
        return self._add(int(np.prod(shape)) * each, RETURNED, each), self._describe(shape, dtype)

    def structure(self, of: ctypes.Structure) -> int:
        """Return the address of a copy of a structure with addresses."""
        return self._add(ctypes.sizeof(of), GIVEN | POINTERS, 8, bytes(of))

    def run(self, operations: Sequence[Operation]) -> None:
        """Make this the memory of a program of operations."""
        self._set_head(RUN, len(operations), bytes(program(operations)))

    def dequantize(self, matrix: Matrix, columns: int, rows: int | None, first: int, count: int, *to: int) -> None:
        """Make this the memory of one call of `dequantize`."""
        number, out = to
        given = struct.pack("<7q", self.structure(matrix), columns, rows or 0, first, count, number, out)
        self._set_head(DEQUANTIZE, 0, given)

    def move(self, kind: int, moves: Sequence[Move]) -> None:
        """Make this the memory of one call of `write_slots` or `read_slots`."""
        self._set_head(kind, len(moves), bytes((Move * len(moves))(*moves)))

    def encode(self) -> bytes:
        """Return the program as the driver reads it."""
        kind, count = self._head
        parts = [struct.pack("<6q", MAGIC, kind, count, self.threads, int(self.is_fresh), len(self.regions))]
        parts += [struct.pack("<4q", each.size, each.flags, each.where, each.skew) for each in self.regions]
        for each in self.regions:
            parts += [each.content, b"\0" * (-len(each.content) % 8)]
        return b"".join(parts)

    def returned_size(self) -> int:
        """Return the bytes of the results."""
        return sum(each.size for each in self.regions if each.flags & RETURNED)

    def decode(self, data: bytes) -> dict[int, Array]:
        """Return the results by region number."""
        found, at = {}, 0
        for number, each in enumerate(self.regions):
            if each.flags & RETURNED:
                found[number] = np.frombuffer(data[at : at + each.size], each.dtype).reshape(each.shape)
                at += each.size
        return found

    def _set_head(self, kind: int, count: int, content: bytes) -> None:
        self._head = kind, count
        self.regions[0] = Region(len(content), GIVEN | POINTERS, AT_END, 0, content)

    def _describe(self, shape: tuple[int, ...], dtype: Any) -> int:
        self.regions[-1].shape, self.regions[-1].dtype = shape, dtype
        return len(self.regions) - 1

    def _add(self, size: int, flags: int, align: int, content: bytes = b"") -> int:
        where = self.random.choices((AT_END, AT_START, INSIDE), (6, 3, 2))[0]
        skew = align * self.random.randrange(1, 40)
        self.regions.append(Region(size, flags, where, skew, content))
        return _BASE | (len(self.regions) - 1) << 32
