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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.check_matrices import MATRICES, noise, random_matrix, stored, values
from streamchat.kernels.operations import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    GELU,
    GELU_TANH,
    NO_FUNCTION,
    RELU,
    RELU2,
    SILU,
    SOFTCAP,
    SUPER_32,
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


def main(path: str, number: int) -> None:
    """Print the response to challenge `number`; raise AssertionError if a kernel computes something else."""
    kernels = ctypes.CDLL(path)
    declare(kernels)
    _check_products(kernels)
    _check_rows(kernels)
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
    counts, sizes = (61, 101), (48, 23)  # two blocks of vectors and four, of full panels and others
    for (bits, kind), count in itertools.product(MATRICES, counts):
        columns = 512 if bits < 16 and kind >= SUPER_32 else 160
        x = noise(count, columns)
        made = [random_matrix(bits, rows, columns, kind) for rows in sizes]
        biases = [noise(rows) for rows in sizes]
        matrices = [
            Matrix(_address(data), _address(bias), rows, bits, kind)
            for (data, _), bias, rows in zip(made, biases, sizes, strict=True)
        ]
        out = _zeros(count, sum(sizes))
        _run(kernels, [_product(*matrices, x=x, out=out, columns=columns)])
        meant = np.concatenate([weights for _, weights in made])
        what = f"a product of {count} vectors, weights of {bits} bits, format {kind}"
        _compare(what, out, x @ meant.T + np.concatenate(biases))


def _check_rows(kernels: Any) -> None:
    """Rows of matrices of codes as numbers."""
    ids = np.array([17, 0, 39, 22], np.int64)
    for bits, kind in MATRICES:
        if bits >= 16:
            continue
        data, weights = random_matrix(bits, 40, 512, kind)
        matrix = Matrix(_address(data), None, 40, bits, kind)
        for number in (BFLOAT16, FLOAT16, FLOAT32):
            out = stored(_zeros(4, 512), number)
            kernels.dequantize(ctypes.byref(matrix), 512, _address(ids), 0, 4, number, _address(out))
            expected = values(stored(weights[ids].astype(np.float32), number))
            # codes times scales may round to the other neighbor
            _compare(f"rows of {bits} bits, format {kind}", values(out), expected, 1e-6 if number == FLOAT32 else 5e-3)


@dataclass(frozen=True)
class _Heads:
    """An attention with two key heads, each with `queries` queries."""

    dim: int = 64
    rotary_dim: int = 64
    kind: int = BFLOAT16
    queries: int = 3
    is_interleaved: bool = False
    """Pairs of neighbors are rotated."""
    window: int = 0
    softcap: float = 0.0
    clip: float = 0.0
    norms: str = "shared"
    """`shared` by all heads, `own` weights for each head, one for the `whole` token, or `none`."""
    by_group: bool = False
    """The key of a group of queries follows them."""
    value_size: float = 1.0
    repeats: int = 0
    """1: both key heads have the same key and value."""


_HEADS = (
    _Heads(kind=BFLOAT16),
    _Heads(rotary_dim=16, kind=FLOAT32, by_group=True),
    _Heads(dim=48, rotary_dim=32, kind=FLOAT16, is_interleaved=True, norms="own", value_size=1e-6),  # subnormal numbers
    _Heads(dim=128, rotary_dim=128, kind=FLOAT32, softcap=2.0, window=70, norms="whole"),
    _Heads(dim=32, rotary_dim=32, repeats=1),
    _Heads(dim=16, rotary_dim=0, kind=FLOAT32, queries=19, window=1, norms="none", clip=0.5),
)


def _check_attention(kernels: Any) -> None:
    heads, cached, spans = 2, 200, 2  # two blocks of keys per span
    # one token, which is stored by the task that reads it; a few one by one; many together
    for case, tokens in itertools.product(_HEADS, (1, 3, 50)):
        queries, dim, slots = case.queries, case.dim, cached + tokens + 2
        rows = noise(tokens, heads * (queries + 2), dim)
        if case.by_group:
            parts = rows[:, :-heads].reshape(tokens, heads, queries + 1, dim)
            query, key = parts[:, :, :queries], parts[:, :, queries]
        else:
            query = rows[:, : heads * queries].reshape(tokens, heads, queries, dim)
            key = rows[:, heads * queries : -heads]
        value = rows[:, -heads:]
        value *= case.value_size
        given = [_address(part) for part in (query, key, value)]
        strides = [part.strides[1] // 4 for part in (query, key, value)]
        if case.repeats:
            strides[0] = 0  # there is no other group
            key, value = (np.repeat(part[:, :1], heads, 1) for part in (key, value))
        norms = [_head_norm(case, count) for count in (heads * queries, heads)]
        angles = noise(tokens, case.rotary_dim // 2)
        angles = np.repeat(angles, 2, 1) if case.is_interleaved else np.tile(angles, 2)
        cos, sin = np.cos(angles), np.sin(angles)
        cached_pair = noise(2, heads, slots, dim)
        cached_pair[1] *= case.value_size
        buffers = stored(cached_pair, case.kind)
        before = values(buffers).copy()
        partial = _zeros(kernels.attention_partial(tokens, heads, queries, dim, spans))
        attention = Attention(
            *given,
            *(_address(part) for part in (cos, sin, buffers[0], buffers[1], partial)),
            *(Norm(_address(weight), _address(bias), 1e-5, bias is not None) for weight, bias in norms),
            *strides,
            token_stride=rows[0].size,
            norm_stride=0 if case.norms == "shared" else dim,
            head_stride_bytes=slots * dim * buffers.itemsize,
            cached=cached,
            tokens=tokens,
            rotary_dim=case.rotary_dim,
            num_kv_heads=heads,
            num_kv_groups=queries,
            head_dim=dim,
            format=case.kind,
            spans=spans,
            window=case.window,
            is_interleaved=case.is_interleaved,
            norms_whole=case.norms == "whole",
            repeats=case.repeats,
            scale=0.7 / math.sqrt(dim),
            softcap=case.softcap,
            clip=case.clip,
        )
        out = _zeros(tokens, heads * queries * dim)
        _run(kernels, [*attend(attention), _identity(out, attention=attention)])
        if case.clip:
            query, key, value = (np.clip(part, -case.clip, case.clip) for part in (query, key, value))
        flat = query.reshape(tokens, heads * queries, dim)
        flat, key = (
            _rotated(_normed_heads(case, part, *norm), cos, sin, case.is_interleaved)
            for part, norm in zip((flat, key), norms, strict=True)
        )
        new = [values(stored(part, case.kind)) for part in (key, value)]
        all_keys, all_values = (
            np.concatenate([old[:, :cached], part.transpose(1, 0, 2)], 1) for old, part in zip(before, new, strict=True)
        )
        expected = _attended(flat.reshape(tokens, heads, queries, dim), all_keys, all_values, attention.scale, case)
        _compare(f"attention with {case}", out, expected)


def _head_norm(case: _Heads, heads: int) -> tuple[Array | None, Array | None]:
    """Return weights and biases of a norm of queries or keys: a LayerNorm if each head has its own."""
    if case.norms == "none":
        return None, None
    if case.norms == "own":
        return noise(heads, case.dim), noise(heads, case.dim)
    return (noise(case.dim) if case.norms == "shared" else noise(heads, case.dim)), None


def _normed_heads(case: _Heads, x: Array, weight: Array | None, bias: Array | None) -> Array:
    """Return (tokens, heads, dim) after the norm of queries or keys."""
    if weight is None:
        return x
    if case.norms != "whole":
        return _normed(x, weight, bias)
    return _normed(x.reshape(len(x), -1), weight.ravel()).reshape(x.shape)


def _attended(query: Array, keys: Array, values: Array, scale: float, case: _Heads) -> Array:
    """(tokens, heads, queries, dim), of the last tokens; keys and values (heads, all tokens, dim)."""
    scores = scale * np.einsum("thqd,hkd->thqk", query, keys, dtype=float)
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    tokens, count = len(query), keys.shape[1]
    ages = count - tokens + np.arange(tokens)[:, None] - np.arange(count)
    is_hidden = (ages < 0) | (ages >= (case.window or count))
    shares = np.exp(np.where(is_hidden[:, None, None], -np.inf, scores))
    attended: Array = np.einsum("thqk,hkd->thqd", shares / shares.sum(-1, keepdims=True), values)
    return attended


def _rotated(x: Array, cos: Array, sin: Array, is_interleaved: bool) -> Array:
    """Return `x` (tokens, heads, dim) with as many dimensions rotated as `cos` has, in pairs or by halves."""
    part, rest = np.split(x, [cos.shape[1]], -1)
    if is_interleaved:
        partners = np.stack([-part[..., 1::2], part[..., ::2]], -1).reshape(part.shape)
    else:
        low, high = np.split(part, 2, -1)
        partners = np.concatenate([-high, low], -1)
    return np.concatenate([part * cos[:, None] + partners * sin[:, None], rest], -1)


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
        x, added, more, weight, bias = noise(5, width)
        norm = Norm(_address(weight), _address(bias) if is_layer_norm else None, 1e-5, is_layer_norm)
        out, total, biases = _zeros(1, width), _zeros(width), bias if is_layer_norm else None
        _run(kernels, [_identity(out, x=x, added=added, more=more, sum=total, norm=norm)])
        _compare("a sum", total, x + added + more)
        _compare("a norm", out, _normed(x + added + more, weight, biases))
        _run(kernels, [_identity(out, x=x, added=added, more=more, added_scale=0.3, added_norm=norm, sum=total)])
        _compare("a sum with factor and norm", total, x + 0.3 * (_normed(added, weight, biases) + more))
        _compare("the input of a product", out, total)


def _check_activations(kernels: Any) -> None:
    width = 72
    x, factors, softcap = 4 * noise(width), noise(width), 1.5
    wanted = {
        NO_FUNCTION: x,
        SILU: x / (1 + np.exp(-x)),
        GELU: x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5)),
        GELU_TANH: x * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        RELU: np.maximum(x, 0),
        RELU2: np.maximum(x, 0) ** 2,
        SOFTCAP: softcap * np.tanh(x / softcap),
    }
    diagonal = np.diag(factors)
    for function, expected in wanted.items():
        out = _zeros(1, width)
        _run(kernels, [_identity(out, x=x, function=function, softcap=softcap)])
        _compare("an activation", out, expected, tolerance=1e-5)
        gate = Matrix(_address(diagonal), rows=width, bits=32)
        _run(kernels, [_identity(out, gate, x=x, function=function, softcap=softcap, gated=1)])
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


def _zeros(*shape: int) -> Array:
    return np.zeros(shape, dtype=np.float32)


def _compare(what: str, actual: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    worst, largest = np.abs(actual.ravel() - expected.ravel()).max(), np.abs(expected).max()
    assert worst <= tolerance * largest, f"{what} is off by {worst}, of {largest}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
