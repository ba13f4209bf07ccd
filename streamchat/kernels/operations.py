"""ctypes mirrors of the structures in `source/operations.h`, which documents their members. Needs no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from typing import Any, ClassVar

PRODUCT, ATTENTION, NORM, ACTIVATION = range(4)
SILU, GELU = range(2)
MAX_HEAD_DIM = 256
MAX_QUERIES = 16
"""Maximum query heads per key head."""
GROUP = 32
"""With 4 or 8-bit weights the number of columns must be a multiple of this."""
TILE = 16
"""With 4-bit weights the number of rows must be a multiple of this."""


class Product(ctypes.Structure):
    """`out = x W^T + bias`."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("scratch", c_void_p),
        ("rows", c_long),
        ("columns", c_long),
        ("out_stride", c_long),
        ("bits", c_int),
        ("count", c_int),
    ]


class Attention(ctypes.Structure):
    """Stores one token and attends to all cached tokens of the layer."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("out", c_void_p),
        ("scratch", c_void_p),
        ("query_stride", c_long),
        ("key_stride", c_long),
        ("head_stride_bytes", c_long),
        ("cached", c_long),
        ("rotary_dim", c_int),
        ("num_kv_heads", c_int),
        ("num_kv_groups", c_int),
        ("head_dim", c_int),
        ("element_bytes", c_int),
        ("spans", c_int),
        ("scale", c_float),
    ]


class Norm(ctypes.Structure):
    """Adds residuals to the hidden state, and normalizes it."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("hidden", c_void_p),
        ("added", c_void_p),
        ("more", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("width", c_long),
        ("rows", c_int),
        ("is_layer_norm", c_int),
        ("eps", c_float),
    ]


class Activation(ctypes.Structure):
    """`out = f(x) * up`."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("x", c_void_p),
        ("up", c_void_p),
        ("out", c_void_p),
        ("width", c_long),
        ("stride", c_long),
        ("rows", c_int),
        ("function", c_int),
    ]


class _Any(ctypes.Union):
    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("product", Product),
        ("attention", Attention),
        ("norm", Norm),
        ("activation", Activation),
    ]


class Operation(ctypes.Structure):
    """One operation of any kind."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [("each", _Any), ("kind", c_int)]


_KINDS = {Product: PRODUCT, Attention: ATTENTION, Norm: NORM, Activation: ACTIVATION}


def program(operations: Sequence[ctypes.Structure]) -> ctypes.Array[Operation]:
    """Return the array that `run` takes, with copies of `operations`."""
    array = (Operation * len(operations))()
    for to, each in zip(array, operations, strict=True):
        to.kind = _KINDS[type(each)]
        name = type(each).__name__.lower()
        setattr(to.each, name, each)
    return array


def declare(kernels: Any) -> None:
    """Declare the argument and result types of the library's functions."""
    kernels.run.argtypes, kernels.run.restype = [c_void_p, c_long, c_int], None
    kernels.product_scratch.argtypes, kernels.product_scratch.restype = [c_long], c_long
    kernels.attention_scratch.argtypes, kernels.attention_scratch.restype = [c_int] * 4, c_long
    kernels.pool_threads.restype = c_int
