"""The structures of `source/operations.h`, which describes their members. Needs no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from typing import Any, ClassVar

PRODUCT, ATTENTION, NORM, ACTIVATION = range(4)
SILU, GELU = range(2)
MAX_HEAD_DIM = 256
MAX_QUERIES = 16
"""Heads of queries to one of keys."""
GROUP = 32
"""Columns of a product with 4 or 8 bits are a multiple of it."""
TILE = 16
"""Rows of a product with 4 bits are a multiple of it."""


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
        ("out_step", c_long),
        ("bits", c_int),
        ("count", c_int),
    ]


class Attention(ctypes.Structure):
    """Stores a token and attends to all that the layer holds."""

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
        ("query_step", c_long),
        ("key_step", c_long),
        ("head_bytes", c_long),
        ("held", c_long),
        ("width", c_int),
        ("heads", c_int),
        ("queries", c_int),
        ("dim", c_int),
        ("bytes", c_int),
        ("spans", c_int),
        ("scale", c_float),
    ]


class Norm(ctypes.Structure):
    """Adds to the hidden state, and normalises it."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("hidden", c_void_p),
        ("added", c_void_p),
        ("more", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("width", c_long),
        ("rows", c_int),
        ("centred", c_int),
        ("eps", c_float),
    ]


class Activation(ctypes.Structure):
    """`out = f(x) * up`."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [
        ("x", c_void_p),
        ("up", c_void_p),
        ("out", c_void_p),
        ("width", c_long),
        ("step", c_long),
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
    """One of them."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = [("each", _Any), ("kind", c_int)]


_KINDS = {Product: PRODUCT, Attention: ATTENTION, Norm: NORM, Activation: ACTIVATION}


def program(operations: Sequence[ctypes.Structure]) -> ctypes.Array[Operation]:
    """What `run` takes: copies of `operations`, in their order."""
    made = (Operation * len(operations))()
    for to, each in zip(made, operations, strict=True):
        to.kind = _KINDS[type(each)]
        name = type(each).__name__.lower()
        setattr(to.each, name, each)
    return made


def declare(kernels: Any) -> None:
    """Tell ctypes what the functions of the library take and give."""
    kernels.run.argtypes, kernels.run.restype = [c_void_p, c_long, c_int], None
    kernels.product_scratch.argtypes, kernels.product_scratch.restype = [c_long], c_long
    kernels.attention_scratch.argtypes, kernels.attention_scratch.restype = [c_int] * 4, c_long
    kernels.pool_threads.restype = c_int
