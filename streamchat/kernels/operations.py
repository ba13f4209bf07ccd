"""ctypes mirrors of the structures in `source/operations.h`, which documents their members. Needs no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from typing import Any, ClassVar

PRODUCT, ATTEND, STORE, ROUTE, EXPERTS_UP, EXPERTS_DOWN = range(6)
NO_FUNCTION, SILU, GELU, GELU_TANH, RELU, RELU2, SOFTCAP = range(7)
BFLOAT16, FLOAT16, FLOAT32, INT8, INT4, K8V4 = range(6)
MAX_HEAD_DIM = 256
QUERIES_AT_ONCE = 64
"""Maximum queries of one attention task for several tokens."""
GROUP = 32
"""With 4 or 8-bit weights the number of columns must be a multiple of this."""
TILE = 16
"""Rows of 4 or 8-bit weights that are stored together; the last tile is padded."""
SCALE, SCALE_MIN, SUPER_32, SUPER_16 = range(4)
"""Kinds of scales of 4 or 8-bit weights."""
SUPERBLOCK = 8
"""Groups of a superblock."""
HEADER = 64
"""Bytes before the groups of a superblock, for 16 rows."""


def unit_size(bits: int, scales: int) -> tuple[int, int]:
    """Return columns and bytes of the repeating unit of a tile: a group, or a superblock."""
    block = 64 * bits + (64 if scales == SCALE_MIN else 32)
    return (GROUP * SUPERBLOCK, HEADER + SUPERBLOCK * block) if scales >= SUPER_32 else (GROUP, block)


Members = Sequence[tuple[str, Any]]
"""Names and types of the members of a structure."""


def _members(*declared: tuple[Any, str]) -> Members:
    """Return the members that are declared as in C: a type and all names of that type."""
    return [(name, kind) for kind, names in declared for name in names.split()]


class Matrix(ctypes.Structure):
    """Weights of a product."""

    _fields_: ClassVar[Members] = _members((c_void_p, "data bias"), (c_long, "rows"), (c_int, "bits format"))


class Norm(ctypes.Structure):
    """A norm of the input of another operation."""

    _fields_: ClassVar[Members] = _members((c_void_p, "weight bias"), (c_float, "eps"), (c_int, "is_layer_norm"))


class Attention(ctypes.Structure):
    """Stores new tokens, and attends to all cached tokens of the layer."""

    _fields_: ClassVar[Members] = _members(
        (c_void_p, "query key value cos sin keys values key_scales value_scales partial"),
        (Norm, "query_norm key_norm"),
        (c_long, "query_stride key_stride value_stride token_stride norm_stride head_stride_bytes scale_stride cached"),
        (c_int, "tokens rotary_dim num_kv_heads num_kv_groups head_dim format spans window"),
        (c_int, "is_interleaved norms_whole repeats"),
        (c_float, "scale softcap clip"),
    )


class Product(ctypes.Structure):
    """Sums, norm, product with matrices, activation."""

    _fields_: ClassVar[Members] = _members(
        (Matrix * 3, "matrices"),
        (c_void_p, "x added more"),
        (ctypes.POINTER(Attention), "attention"),
        (c_void_p, "sum out"),
        (Norm, "norm added_norm"),
        (c_long, "columns out_stride"),
        (c_int, "num_matrices count function gated"),
        (c_float, "added_scale softcap"),
    )


class Experts(ctypes.Structure):
    """Chooses experts for each token, and computes them."""

    _fields_: ClassVar[Members] = _members(
        (Matrix, "gate up down"),
        (Norm, "norm"),
        (c_void_p, "x logits shared normed activated out shares factors chosen"),
        (c_long, "columns up_stride down_stride logits_stride"),
        (c_int, "num_experts top_k count function is_normalized has_gate"),
    )


class Move(ctypes.Structure):
    """A range of slots, and their float32 copies; see `source/moves.h`."""

    _fields_: ClassVar[Members] = _members(
        (c_void_p, "originals slots scales cos sin"),
        (c_long, "original_stride head_stride_bytes scale_stride"),
        (c_int, "heads tokens dim first_dim pairs is_interleaved format searches"),
    )


class _Any(ctypes.Union):
    _fields_: ClassVar[Members] = [
        ("product", Product),
        ("attention", ctypes.POINTER(Attention)),
        ("experts", ctypes.POINTER(Experts)),
    ]


class Operation(ctypes.Structure):
    """One operation of any kind."""

    _fields_: ClassVar[Members] = [("each", _Any), ("kind", c_int)]


def product(*matrices: Matrix, **members: Any) -> Operation:
    """Return the operation that multiplies with one to three matrices; see `source/operations.h`."""
    members = {"added_scale": 1.0} | members
    return Operation(_Any(product=Product((Matrix * 3)(*matrices), num_matrices=len(matrices), **members)), PRODUCT)


def attend(attention: Attention) -> list[Operation]:
    """Return the operations of `attention`, which refer to it. Several tokens are stored before they attend."""
    kinds = (ATTEND,) if attention.tokens == 1 else (STORE, ATTEND)
    return [Operation(_Any(attention=ctypes.pointer(attention)), kind) for kind in kinds]


def route(experts: Experts) -> Operation:
    """Return the operation that chooses experts; it refers to `experts`."""
    return Operation(_Any(experts=ctypes.pointer(experts)), ROUTE)


def compute_experts(experts: Experts) -> list[Operation]:
    """Return the operations that compute the chosen experts; they refer to `experts`."""
    return [Operation(_Any(experts=ctypes.pointer(experts)), kind) for kind in (EXPERTS_UP, EXPERTS_DOWN)]


def program(operations: Sequence[Operation]) -> ctypes.Array[Operation]:
    """Return the array that `run` takes. Keep alive what the operations refer to."""
    return (Operation * len(operations))(*operations)


def declare(kernels: Any) -> None:
    """Declare the argument and result types of the library's functions."""
    kernels.run.argtypes, kernels.run.restype = [c_void_p, c_long, c_int], c_int
    kernels.dequantize.argtypes = [c_void_p, c_long, c_void_p, c_long, c_long, c_int, c_void_p]
    kernels.dequantize.restype = None
    kernels.attention_partial.argtypes, kernels.attention_partial.restype = [c_int] * 5, c_long
    for moved in (kernels.write_slots, kernels.read_slots):
        moved.argtypes, moved.restype = [c_void_p, c_int, c_int], c_int
