"""Compares compiled kernels with NumPy: `python -m streamchat.kernels.check LIBRARY NUMBER`. Needs no torch.

Runs in a separate process after compilation: if the compiler used instructions that the processor lacks, only that
process dies. At the end it prints the kernels' response to challenge NUMBER, which proves that they ran.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import (
    GELU,
    NO_FUNCTION,
    SILU,
    Attention,
    Matrix,
    Norm,
    Operation,
    attend,
    declare,
    product,
    program,
)

Array = NDArray[Any]
TOLERANCE = 2e-4
"""Largest accepted error, as a share of the largest element of a result."""
_random = np.random.default_rng(1)


def main(path: str, number: int) -> None:
    """Print the response to challenge `number`; raise AssertionError if a kernel computes something else."""
    kernels = ctypes.CDLL(path)
    declare(kernels)
    _check_products(kernels)
    _check_attention(kernels)
    _check_inputs(kernels)
    _check_activations(kernels)
    _check_many_tasks(kernels)
    print(*_respond(kernels, *challenge(number)))


def challenge(number: int) -> tuple[Array, Array]:
    """Return a matrix and a vector of integers so small that float sums are exact in any order."""
    draw = np.random.default_rng(number).integers
    return draw(-99, 100, (16, 32)), draw(-99, 100, 32)


def expected_response(matrix: Array, vector: Array) -> list[int]:
    """Return the product of matrix and vector."""
    return [int(value) for value in matrix @ vector]


def _respond(kernels: Any, matrix: Array, vector: Array) -> list[int]:
    """Return the product of matrix and vector, computed by the kernels."""
    out, data = _zeros(1, len(matrix)), matrix.astype(np.float32)
    given = Matrix(_address(data), rows=len(matrix), bits=32)
    _run(kernels, [_product(given, x=vector.astype(np.float32), out=out, columns=len(vector))])
    return [int(value) for value in out[0]]


def _check_products(kernels: Any) -> None:
    columns, count = 160, 61  # two blocks of vectors, of full panels and others
    x, sizes = _noise(count, columns), (48, 32)
    for bits in (4, 8, 16, 32):
        made = [random_matrix(bits, rows, columns) for rows in sizes]
        biases = [_noise(rows) for rows in sizes]
        matrices = [
            Matrix(_address(data), _address(scales), _address(bias), rows, bits)
            for (data, scales, _), bias, rows in zip(made, biases, sizes, strict=True)
        ]
        out = _zeros(count, sum(sizes))
        _run(kernels, [_product(*matrices, x=x, out=out, columns=columns)])
        meant = np.concatenate([weights for _, _, weights in made])
        _compare(f"a product with weights of {bits} bits", out, x @ meant.T + np.concatenate(biases))


def random_matrix(bits: int, rows: int, columns: int) -> tuple[Array, Array | None, Array]:
    """Return random data, its scales, and the weights that it represents."""
    if bits == 4:
        return _int4_matrix(rows, columns)
    if bits == 8:
        codes, scales = _random.integers(-127, 128, (rows, columns)), _rounded(0.01 * _random.random(rows))
        return codes.astype(np.int8), _bfloat16(scales), scales[:, None] * codes
    weights = _rounded(_noise(rows, columns))
    return (_bfloat16(weights) if bits == 16 else weights), None, weights.astype(float)


def _int4_matrix(rows: int, columns: int) -> tuple[Array, None, Array]:
    tiles, groups = rows // 16, columns // 32
    codes = _random.integers(0, 16, (rows, columns))
    scales = _rounded(0.1 * _random.random((rows, groups)))
    zeros = _rounded(_random.random((rows, groups)) - 0.5)
    # (tile, row, group, quarter, nibble, half): four nibbles make a 16-bit word
    nibbles = codes.reshape(tiles, 16, groups, 4, 4, 2)
    words = (nibbles << np.array([[0], [4], [8], [12]])).sum(4).transpose(0, 2, 3, 1, 4).reshape(tiles, groups, -1)
    pairs = np.stack([_bfloat16(scales), _bfloat16(zeros)], -1).reshape(tiles, 16, groups, 2)
    data = np.concatenate([words, pairs.transpose(0, 2, 1, 3).reshape(tiles, groups, -1)], -1)
    return data.astype(np.uint16), None, scales.repeat(32, 1) * (codes - 8) + zeros.repeat(32, 1)


def _check_attention(kernels: Any) -> None:
    heads, queries, cached, spans = 2, 3, 200, 2  # two blocks of keys per span
    for dim, rotary_dim, size, tokens in ((64, 64, 2, 3), (64, 16, 4, 50), (48, 48, 2, 50), (128, 128, 4, 3)):
        slots, scale = cached + tokens + 2, 0.7 / math.sqrt(dim)
        qkv = _noise(tokens, heads * (queries + 2), dim)
        query_norm, key_norm = _noise(2, dim)
        angles = np.tile(_noise(tokens, rotary_dim // 2), 2)
        cos, sin = np.cos(angles), np.sin(angles)
        stored = _rounded(_noise(2, heads, slots, dim))
        buffers = _bfloat16(stored) if size == 2 else stored.copy()
        partial = _zeros(kernels.attention_partial(tokens, heads, queries, dim, spans))
        first_key, first_value = heads * queries, heads * (queries + 1)
        attention = Attention(
            query=_address(qkv),
            key=_address(qkv[:, first_key:]),
            value=_address(qkv[:, first_value:]),
            cos=_address(cos),
            sin=_address(sin),
            keys=_address(buffers[0]),
            values=_address(buffers[1]),
            partial=_address(partial),
            query_norm=Norm(_address(query_norm), None, 1e-5, 0),
            key_norm=Norm(_address(key_norm), None, 1e-5, 0),
            head_stride=dim,
            token_stride=qkv[0].size,
            head_stride_bytes=slots * dim * size,
            cached=cached,
            tokens=tokens,
            rotary_dim=rotary_dim,
            num_kv_heads=heads,
            num_kv_groups=queries,
            head_dim=dim,
            element_bytes=size,
            spans=spans,
            scale=scale,
        )
        out = _zeros(tokens, heads * queries * dim)
        _run(kernels, [*attend(attention), _identity(out, attention=attention)])
        query = _rotated(_normed(qkv[:, :first_key], query_norm), cos, sin).reshape(tokens, heads, queries, dim)
        key = _rotated(_normed(qkv[:, first_key:first_value], key_norm), cos, sin)
        new = [_rounded(part) if size == 2 else part for part in (key, qkv[:, first_value:])]
        keys, values = (
            np.concatenate([old[:, :cached], part.transpose(1, 0, 2)], 1) for old, part in zip(stored, new, strict=True)
        )
        _compare(f"attention with heads of {dim} in {size} bytes", out, _attended(query, keys, values, scale))


def _attended(query: Array, keys: Array, values: Array, scale: float) -> Array:
    """(tokens, heads, queries, dim), of the last tokens; keys and values (heads, all tokens, dim)."""
    scores = scale * np.einsum("thqd,hkd->thqk", query, keys, dtype=float)
    tokens, count = len(query), keys.shape[1]
    is_later = np.arange(count) > count - tokens + np.arange(tokens)[:, None]
    shares = np.exp(np.where(is_later[:, None, None], -np.inf, scores))
    attended: Array = np.einsum("thqk,hkd->thqd", shares / shares.sum(-1, keepdims=True), values)
    return attended


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    """Return `x` (tokens, heads, dim) with its first dimensions, as many as `cos` has, rotated by halves."""
    part, rest = np.split(x, [cos.shape[1]], -1)
    low, high = np.split(part, 2, -1)
    turned = part * cos[:, None] + np.concatenate([-high, low], -1) * sin[:, None]
    return np.concatenate([turned, rest], -1)


def _normed(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return `x` after LayerNorm if there is a bias, else after RMSNorm."""
    x = x.astype(float)
    if bias is not None:
        x -= x.mean(-1, keepdims=True)
    x *= weight / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x if bias is None else x + bias


def _check_inputs(kernels: Any) -> None:
    """Sums and norms before a product."""
    width = 72
    for is_layer_norm in (0, 1):
        x, added, more, weight, bias = _noise(5, width)
        norm = Norm(_address(weight), _address(bias) if is_layer_norm else None, 1e-5, is_layer_norm)
        out, total = _zeros(1, width), _zeros(width)
        _run(kernels, [_identity(out, x=x, added=added, more=more, sum=total, norm=norm)])
        _compare("a sum", total, x + added + more)
        _compare("a norm", out, _normed(x + added + more, weight, bias if is_layer_norm else None))


def _check_activations(kernels: Any) -> None:
    width = 72
    x, factors = 4 * _noise(width), _noise(width)
    wanted = {
        NO_FUNCTION: x,
        SILU: x / (1 + np.exp(-x)),
        GELU: x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5)),
    }
    diagonal = np.diag(factors)
    for function, expected in wanted.items():
        out = _zeros(1, width)
        _run(kernels, [_identity(out, x=x, function=function)])
        _compare("an activation", out, expected)
        gate = Matrix(_address(diagonal), rows=width, bits=32)
        _run(kernels, [_identity(out, gate, x=x, function=function, gated=1)])
        _compare("a gate", out, expected * factors * x)


def _check_many_tasks(kernels: Any) -> None:
    """A chain of products, each of which needs all results of the one before."""
    width, steps = 64, 400
    data = np.roll(np.eye(width, dtype=np.float32), 1, axis=0)
    chain = _zeros(steps + 1, 1, width)
    chain[0] = np.arange(width)
    matrix = Matrix(_address(data), rows=width, bits=32)
    operations = [_product(matrix, x=x, out=out, columns=width) for x, out in itertools.pairwise(chain)]
    _run(kernels, operations, threads=3)
    _compare("a chain of products", chain[-1], np.roll(np.arange(width), steps))


def _identity(out: Array, *more: Matrix, attention: Attention | None = None, **members: Any) -> Operation:
    """Return a product with the identity matrix, and `more`."""
    data = np.eye(out.shape[1], dtype=np.float32)
    if attention is not None:
        members["attention"] = ctypes.pointer(attention)
    matrix = Matrix(_address(data), rows=len(data), bits=32)
    operation: Any = _product(matrix, *more, out=out, columns=len(data), **members)
    operation.arrays.append(data)
    found: Operation = operation
    return found


def _product(*matrices: Matrix, out: Array, columns: int, **members: Any) -> Any:
    """Return a product whose pointers are given as arrays, `out` as (rows, columns); keeps the arrays alive."""
    arrays = {name: value for name, value in members.items() if isinstance(value, np.ndarray)} | {"out": out}
    members |= {name: _address(value) for name, value in arrays.items()}
    operation: Any = product(*matrices, columns=columns, count=len(out), out_stride=out.shape[1], **members)
    operation.arrays = [*arrays.values()]
    return operation


def _address(array: Array | None) -> int | None:
    """Return the address of an array's first element, or of nothing."""
    return None if array is None else int(array.ctypes.data)


def _run(kernels: Any, operations: Sequence[Operation], threads: int = 2) -> None:
    status = kernels.run(program(operations), len(operations), threads)
    assert status == 0, "no memory"


def _noise(*shape: int) -> Array:
    return _random.standard_normal(shape, dtype=np.float32)


def _zeros(*shape: int) -> Array:
    return np.zeros(shape, dtype=np.float32)


def _bfloat16(values: Array) -> Array:
    """Round to nearest, ties to even; returns the bits."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _rounded(values: Array) -> Array:
    """Return the values of `_bfloat16` in float32."""
    return (_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


def _compare(what: str, actual: Array, expected: Array) -> None:
    worst, largest = np.abs(actual.ravel() - expected.ravel()).max(), np.abs(expected).max()
    assert worst <= TOLERANCE * largest, f"{what} is off by {worst}, of {largest}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
