"""Runs operations of the kernels on NumPy arrays, and compares results. Needs no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import Attention, Matrix, Operation, product, program

Array = NDArray[Any]
TOLERANCE = 2e-4
"""Largest accepted error, as a share of the largest element of a result."""


def identity(out: Array, *more: Matrix, attention: Attention | None = None, **members: Any) -> Operation:
    """Return a product with the identity matrix, and `more`."""
    data = np.eye(out.shape[1], dtype=np.float32)
    if attention is not None:
        members["attention"] = ctypes.pointer(attention)
    matrix = Matrix(address(data), rows=len(data), bits=32)
    operation: Any = array_product(matrix, *more, out=out, columns=len(data), **members)
    operation.arrays.append(data)
    found: Operation = operation
    return found


def array_product(*matrices: Matrix, out: Array, columns: int, **members: Any) -> Any:
    """Return a product whose pointers are given as arrays, `out` as (rows, columns); keeps the arrays alive."""
    arrays = {name: value for name, value in members.items() if isinstance(value, np.ndarray)} | {"out": out}
    members |= {name: address(value) for name, value in arrays.items()}
    operation: Any = product(*matrices, columns=columns, count=len(out), out_stride=out.shape[1], **members)
    operation.arrays = [*arrays.values()]
    return operation


def address(array: Array | None) -> int | None:
    """Return the address of an array's first element, or of nothing."""
    return None if array is None else int(array.ctypes.data)


def run(kernels: Any, operations: Sequence[Operation], threads: int = 2) -> None:
    status = kernels.run(program(operations), len(operations), threads)
    assert status == 0, "no memory"


def zeros(*shape: int) -> Array:
    return np.zeros(shape, dtype=np.float32)


def compare(what: str, actual: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    worst, largest = np.abs(actual.ravel() - expected.ravel()).max(), np.abs(expected).max()
    assert worst <= tolerance * largest, f"{what} is off by {worst}, of {largest}"


def normed(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return `x` after LayerNorm if there is a bias, else after RMSNorm."""
    x = x.astype(float)
    if bias is not None:
        x -= x.mean(-1, keepdims=True)
    x *= weight / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x if bias is None else x + bias
