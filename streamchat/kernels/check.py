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
    Attention,
    Experts,
    Matrix,
    Norm,
    Operation,
    attend,
    compute_experts,
    declare,
    product,
    program,
    route,
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
    _check_experts(kernels)
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
    x, sizes = _noise(count, columns), (48, 23)
    for bits, kind in ((4, BFLOAT16), (8, BFLOAT16), (16, BFLOAT16), (16, FLOAT16), (32, FLOAT32)):
        made = [random_matrix(bits, rows, columns, kind) for rows in sizes]
        biases = [_noise(rows) for rows in sizes]
        matrices = [
            Matrix(_address(data), _address(bias), rows, bits, kind)
            for (data, _), bias, rows in zip(made, biases, sizes, strict=True)
        ]
        out = _zeros(count, sum(sizes))
        _run(kernels, [_product(*matrices, x=x, out=out, columns=columns)])
        meant = np.concatenate([weights for _, weights in made])
        _compare(f"a product with weights of {bits} bits", out, x @ meant.T + np.concatenate(biases))


def random_matrix(bits: int, rows: int, columns: int, kind: int = BFLOAT16) -> tuple[Array, Array]:
    """Return random data, and the weights that it represents; `kind` is the format of 16 bits."""
    if bits < 16:
        data, weights = (_int4_matrix if bits == 4 else _int8_matrix)(-(-rows // 16), columns)
        return data, weights[:rows]
    data = _stored(_noise(rows, columns), kind if bits == 16 else FLOAT32)
    return data, _values(data).astype(float)


def _int8_matrix(tiles: int, columns: int) -> tuple[Array, Array]:
    """Return tiles as kernels/source/tiles.h describes them, and (16 * tiles, columns) weights."""
    groups = columns // 32
    codes = _random.integers(-127, 128, (tiles, 16, groups, 16, 2))
    scales = (0.01 * _random.random((tiles, 16, groups))).astype(np.float16)
    pairs = codes.transpose(0, 2, 3, 1, 4).reshape(tiles, groups, -1).astype(np.int8)
    parts = [np.ascontiguousarray(part).view(np.uint8) for part in (pairs, scales.transpose(0, 2, 1))]
    weights = scales.astype(float)[..., None, None] * codes
    return np.concatenate(parts, -1), weights.reshape(16 * tiles, columns)


def _int4_matrix(tiles: int, columns: int) -> tuple[Array, Array]:
    """Return tiles as kernels/source/tiles.h describes them, and (16 * tiles, columns) weights."""
    rows, groups = 16 * tiles, columns // 32
    codes = _random.integers(0, 16, (rows, columns))
    scales = _rounded(0.1 * _random.random((rows, groups)))
    zeros = _rounded(_random.random((rows, groups)) - 0.5)
    # (tile, row, group, quarter, nibble, half): four nibbles make a 16-bit word
    nibbles = codes.reshape(tiles, 16, groups, 4, 4, 2)
    words = (nibbles << np.array([[0], [4], [8], [12]])).sum(4).transpose(0, 2, 3, 1, 4).reshape(tiles, groups, -1)
    pairs = np.stack([_bfloat16(scales), _bfloat16(zeros)], -1).reshape(tiles, 16, groups, 2)
    data = np.concatenate([words, pairs.transpose(0, 2, 1, 3).reshape(tiles, groups, -1)], -1)
    return data.astype(np.uint16), scales.repeat(32, 1) * (codes - 8) + zeros.repeat(32, 1)


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
        rows = _noise(tokens, heads * (queries + 2), dim)
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
        angles = _noise(tokens, case.rotary_dim // 2)
        angles = np.repeat(angles, 2, 1) if case.is_interleaved else np.tile(angles, 2)
        cos, sin = np.cos(angles), np.sin(angles)
        cached_pair = _noise(2, heads, slots, dim)
        cached_pair[1] *= case.value_size
        buffers = _stored(cached_pair, case.kind)
        before = _values(buffers).copy()
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
        new = [_values(_stored(part, case.kind)) for part in (key, value)]
        keys, values = (
            np.concatenate([old[:, :cached], part.transpose(1, 0, 2)], 1) for old, part in zip(before, new, strict=True)
        )
        expected = _attended(flat.reshape(tokens, heads, queries, dim), keys, values, attention.scale, case)
        _compare(f"attention with {case}", out, expected)


def _head_norm(case: _Heads, heads: int) -> tuple[Array | None, Array | None]:
    """Return weights and biases of a norm of queries or keys: a LayerNorm if each head has its own."""
    if case.norms == "none":
        return None, None
    if case.norms == "own":
        return _noise(heads, case.dim), _noise(heads, case.dim)
    return (_noise(case.dim) if case.norms == "shared" else _noise(heads, case.dim)), None


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
        x, added, more, weight, bias = _noise(5, width)
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
    x, factors, softcap = 4 * _noise(width), _noise(width), 1.5
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


def _check_experts(kernels: Any) -> None:
    """Mixtures of experts, for one token and for so many that an expert has more than a block of them."""
    for bits, kind in ((4, BFLOAT16), (8, BFLOAT16), (16, BFLOAT16), (16, FLOAT16), (32, FLOAT32)):
        for count in (1, 5, 150):
            _check_mixture(kernels, bits, kind, count, is_normalized=False, has_gate=False)
    for is_normalized, has_gate in ((True, False), (True, True), (False, True)):
        _check_mixture(kernels, 8, BFLOAT16, 5, is_normalized, has_gate)


def _check_mixture(kernels: Any, bits: int, kind: int, count: int, is_normalized: bool, has_gate: bool) -> None:
    """Five experts, two of which are chosen; the shared one exists if it has a gate."""
    num, top_k, columns, width = 5, 2, 64, 96 if bits < 16 else 40
    (up_data, up), (down_data, down) = (
        random_matrix(bits, num * rows, size, kind) for rows, size in ((2 * width, columns), (columns, width))
    )
    up_stride, down_stride = (data.nbytes // num for data in (up_data, down_data))
    x, weight, logits = _noise(count, columns), _noise(columns), 3 * _noise(count, num + 1)
    shared = _noise(count, columns) if has_gate else None
    normed, activated, out = _zeros(count, columns), _zeros(count * top_k, width), _zeros(count, columns)
    shares, factors, chosen = _zeros(count, top_k), _zeros(count), np.zeros((count, top_k), dtype=np.int32)
    gate = Matrix(_address(up_data), rows=width, bits=bits, format=kind)
    experts = Experts(
        gate,
        Matrix(gate.data + up_stride // 2, rows=width, bits=bits, format=kind),
        Matrix(_address(down_data), rows=columns, bits=bits, format=kind),
        Norm(_address(weight), None, 1e-5, 0),
        *(_address(each) for each in (x, logits, shared, normed, activated, out, shares, factors, chosen)),
        columns=columns,
        up_stride=up_stride,
        down_stride=down_stride,
        logits_stride=num + 1,
        num_experts=num,
        top_k=top_k,
        count=count,
        function=SILU,
        is_normalized=is_normalized,
        has_gate=has_gate,
    )
    _run(kernels, [route(experts), *compute_experts(experts)], threads=3)
    best = np.argsort(-logits[:, :num], axis=1)[:, :top_k]
    weights = np.exp(logits[:, :num])
    meant = np.take_along_axis(weights, best, 1)
    meant /= (meant if is_normalized else weights).sum(1, keepdims=True)
    what = f"a mixture of experts of {bits} bits for {count} tokens"
    assert (chosen == best).all(), f"{what} chose other experts"
    _compare(f"a share in {what}", shares, meant)
    inputs = _normed(x, weight)
    expected = np.zeros((count, columns)) if shared is None else shared / (1 + np.exp(-logits[:, num:]))
    gates, downs = up.reshape(num, 2, width, columns), down.reshape(num, columns, width)
    for token, choice in itertools.product(range(count), range(top_k)):
        expert = best[token, choice]
        g, u = gates[expert] @ inputs[token]
        expected[token] += meant[token, choice] * (downs[expert] @ (g / (1 + np.exp(-g)) * u))
    _compare(what, out, expected)


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


def _stored(values: Array, kind: int) -> Array:
    """Return `values` in a format of 16 or 32 bits, bfloat16 as its bits."""
    if kind == BFLOAT16:
        return _bfloat16(values)
    return values.astype(np.float16 if kind == FLOAT16 else np.float32)


def _values(stored: Array) -> Array:
    """Return what `_stored` stored, in float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def _compare(what: str, actual: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    worst, largest = np.abs(actual.ravel() - expected.ravel()).max(), np.abs(expected).max()
    assert worst <= tolerance * largest, f"{what} is off by {worst}, of {largest}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
