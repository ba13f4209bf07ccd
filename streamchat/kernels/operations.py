"""ctypes mirrors of the structures in `source/operations.h`, which documents their members. Needs no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from typing import Any, ClassVar

PRODUCT, ATTEND, STORE = range(3)
NO_FUNCTION, SILU, GELU = range(3)
MAX_HEAD_DIM = 256
MAX_QUERIES = 16
"""Maximum query heads per key head."""
GROUP = 32
"""With 4 or 8-bit weights the number of columns must be a multiple of this."""
TILE = 16
"""With 4-bit weights the number of rows must be a multiple of this."""


class Matrix(ctypes.Structure):
    """Weights of a product."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("rows", c_long),
        ("bits", c_int),
    ]


class Norm(ctypes.Structure):
    """A norm of the input of another operation."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("is_layer_norm", c_int),
    ]


class Attention(ctypes.Structure):
    """Stores new tokens, and attends to all cached tokens of the layer."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("partial", c_void_p),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("head_stride", c_long),
        ("token_stride", c_long),
        ("head_stride_bytes", c_long),
        ("cached", c_long),
        ("tokens", c_int),
        ("rotary_dim", c_int),
        ("num_kv_heads", c_int),
        ("num_kv_groups", c_int),
        ("head_dim", c_int),
        ("element_bytes", c_int),
        ("spans", c_int),
        ("scale", c_float),
    ]


class Product(ctypes.Structure):
    """Sums, norm, product with matrices, activation."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("matrices", Matrix * 3),
        ("x", c_void_p),
        ("added", c_void_p),
        ("more", c_void_p),
        ("attention", ctypes.POINTER(Attention)),
        ("sum", c_void_p),
        ("out", c_void_p),
        ("norm", Norm),
        ("columns", c_long),
        ("out_stride", c_long),
        ("num_matrices", c_int),
        ("count", c_int),
        ("function", c_int),
        ("gated", c_int),
    ]


class _Any(ctypes.Union):
    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("product", Product),
        ("attention", ctypes.POINTER(Attention)),
    ]


class Operation(ctypes.Structure):
    """One operation of any kind."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [("each", _Any), ("kind", c_int)]


def product(*matrices: Matrix, **members: Any) -> Operation:
    """Return the operation that multiplies with one to three matrices; see `source/operations.h`."""
    return Operation(_Any(product=Product((Matrix * 3)(*matrices), num_matrices=len(matrices), **members)), PRODUCT)


def attend(attention: Attention) -> list[Operation]:
    """Return the operations of `attention`, which refer to it. Several tokens are stored before they attend."""
    kinds = (ATTEND,) if attention.tokens == 1 else (STORE, ATTEND)
    return [Operation(_Any(attention=ctypes.pointer(attention)), kind) for kind in kinds]


def program(operations: Sequence[Operation]) -> ctypes.Array[Operation]:
    """Return the array that `run` takes. Keep the attentions alive, to which the operations refer."""
    return (Operation * len(operations))(*operations)


def declare(kernels: Any) -> None:
    """Declare the argument and result types of the library's functions."""
    kernels.run.argtypes, kernels.run.restype = [c_void_p, c_long, c_int], c_int
    kernels.attention_partial.argtypes, kernels.attention_partial.restype = [c_int] * 5, c_long
