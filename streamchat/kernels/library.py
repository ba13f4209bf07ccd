"""Python access to the compiled kernels."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

from streamchat.kernels.build import KernelsUnavailableError, library
from streamchat.kernels.operations import Matrix, Move, Operation, declare

_log = logging.getLogger(__name__)


class Kernels:
    """The functions of `source/`; tensors are passed by address."""

    def __init__(self, loaded: Any) -> None:
        declare(loaded)
        self._run, self._dequantize = loaded.run, loaded.dequantize
        self._write_slots, self._read_slots = loaded.write_slots, loaded.read_slots
        self.attention_partial = loaded.attention_partial
        """(tokens, num_kv_heads, num_kv_groups, head_dim, spans) -> floats for partial results."""

    def run(self, operations: ctypes.Array[Operation], threads: int) -> None:
        """Run the operations one after the other with up to `threads` threads.

        Raises:
            MemoryError: There is no scratch memory.
        """
        if self._run(operations, len(operations), threads):
            raise MemoryError("no scratch memory for the compiled kernels")

    def dequantize(self, matrix: Matrix, columns: int, ids: int | None, first: int, count: int, *to: int) -> None:
        """Write rows of a matrix of codes as numbers; see `source/dequantize.c`. Releases the GIL.

        Args:
            matrix: The matrix, of 4 or 8 bits.
            columns: Its columns.
            ids: Address of `count` numbers of rows, int64; None for `count` rows from `first` on.
            first: The first row.
            count: Number of rows.
            *to: Number format, and address of (count, columns) numbers.
        """
        self._dequantize(ctypes.byref(matrix), columns, ids, first, count, *to)

    def write_slots(self, moves: ctypes.Array[Move], threads: int) -> None:
        """Write the slots of each move from its originals with up to `threads` threads. Releases the GIL.

        Raises:
            MemoryError: There is no memory for the threads.
        """
        self._moved(self._write_slots(moves, len(moves), threads))

    def read_slots(self, moves: ctypes.Array[Move], threads: int) -> None:
        """Write the originals of each move from its slots; otherwise like `write_slots`."""
        self._moved(self._read_slots(moves, len(moves), threads))

    @staticmethod
    def _moved(status: int) -> None:
        if status:
            raise MemoryError("no memory for the threads of the compiled kernels")

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self  # copies of a model share the library

    def __reduce__(self) -> Any:
        return load_kernels, ("auto",)  # addresses mean nothing in another process


def load_kernels(setting: str) -> Kernels | None:
    """Return the compiled kernels, compiling them at first use.

    Returns None if there are none; `why_unavailable` says why.

    Args:
        setting: The `kernels` setting: `auto` uses compiled kernels if available, `torch` does not.
    """
    return _loaded()[0] if setting == "auto" else None


def why_unavailable(setting: str) -> str:
    """Return why `load_kernels` returns None; '' if it does not."""
    return _loaded()[1] if setting == "auto" else f"kernels = {setting!r} was chosen"


@functools.cache
def _loaded() -> tuple[Kernels | None, str]:
    try:
        found = Kernels(library().load())
    except (KernelsUnavailableError, OSError, AttributeError) as error:
        _log.info("no compiled kernels: %s", error)
        return None, str(error)
    return found, ""
