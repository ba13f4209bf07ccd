"""Compares compiled kernels with plain Python: `python -m streamchat.kernels.check LIBRARY NUMBER`. Needs no torch.

Runs in a separate process after compilation: if the compiler used instructions that the processor lacks, only that
process dies. At the end it prints the kernels' response to challenge NUMBER, which proves that they ran.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import struct
import sys
from collections.abc import Sequence
from typing import Any

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

TOLERANCE = 2e-4
"""Largest accepted error, as a share of the largest element of a result."""


def main(path: str, number: int) -> None:
    """Print the response to challenge `number`; raise AssertionError if a kernel computes something else."""
    kernels = ctypes.CDLL(path)
    declare(kernels)
    random.seed(1)
    _check_products(kernels)
    _check_attention(kernels)
    _check_inputs(kernels)
    _check_activations(kernels)
    _check_many_tasks(kernels)
    print(*_respond(kernels, *challenge(number)))


def challenge(number: int) -> tuple[list[list[int]], list[int]]:
    """Return the rows of a matrix and a vector of integers so small that float sums are exact in any order."""
    draw = random.Random(number).randint
    return [[draw(-99, 99) for _ in range(32)] for _ in range(16)], [draw(-99, 99) for _ in range(32)]


def expected_response(rows: list[list[int]], vector: list[int]) -> list[int]:
    """Return the product of matrix and vector."""
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in rows]


def _respond(kernels: Any, rows: list[list[int]], vector: list[int]) -> list[int]:
    """Return the product of matrix and vector, computed by the kernels."""
    out = _floats(len(rows))
    data = _floats([value for row in rows for value in row])
    matrix = Matrix(_address(data), rows=len(rows), bits=32)
    _run(kernels, [_product(matrix, x=_floats(vector), out=out, columns=len(vector))])
    return [int(value) for value in out]


def _check_products(kernels: Any) -> None:
    columns, count = 96, 37  # two blocks of vectors; four at once, and one
    x, sizes = _noise(count * columns), (48, 32)
    for bits in (4, 8, 16, 32):
        made = [_matrix(bits, rows, columns) for rows in sizes]
        biases = [_noise(rows) for rows in sizes]
        given = [(data, scales, _floats(bias)) for (data, scales, _), bias in zip(made, biases, strict=True)]
        matrices = [Matrix(*map(_address, each), rows, bits) for each, rows in zip(given, sizes, strict=True)]
        out = _floats(count * sum(sizes))
        operation = _product(*matrices, x=_floats(x), out=out, columns=columns, count=count, out_stride=sum(sizes))
        _run(kernels, [operation])
        meant = [row for _, _, rows in made for row in rows]
        bias = [value for each in biases for value in each]
        expected = [
            b + sum(a * w for a, w in zip(x[n * columns : (n + 1) * columns], row, strict=True))
            for n in range(count)
            for row, b in zip(meant, bias, strict=True)
        ]
        _compare(f"a product with weights of {bits} bits", out, expected)


def _matrix(bits: int, rows: int, columns: int) -> tuple[Any, Any, list[list[float]]]:
    """Return random data, its scales, and the weights that it represents."""
    if bits == 4:
        return _int4_matrix(rows, columns)
    if bits == 8:
        codes = [[random.randint(-127, 127) for _ in range(columns)] for _ in range(rows)]
        scales = [_rounded(0.01 * random.random()) for _ in range(rows)]
        meant = [[s * code for code in row] for s, row in zip(scales, codes, strict=True)]
        data = b"".join(struct.pack(f"{columns}b", *row) for row in codes)
        return data, b"".join(map(_bfloat16, scales)), meant
    weights = [[_rounded(value) for value in _noise(columns)] for _ in range(rows)]
    flat = [value for row in weights for value in row]
    if bits == 16:
        return b"".join(map(_bfloat16, flat)), None, weights
    return _floats(flat), None, weights


def _int4_matrix(rows: int, columns: int) -> tuple[bytes, None, list[list[float]]]:
    codes = [[random.randint(0, 15) for _ in range(columns)] for _ in range(rows)]
    scales = [[_rounded(0.1 * random.random()) for _ in range(columns // 32)] for _ in range(rows)]
    zeros = [[_rounded(random.random() - 0.5) for _ in range(columns // 32)] for _ in range(rows)]
    data = b""
    for tile in range(0, rows, 16):
        for g in range(columns // 32):
            for i in range(4):
                for r in range(tile, tile + 16):
                    for half in (0, 1):
                        word = [codes[r][32 * g + 8 * i + 2 * j + half] << (4 * j) for j in range(4)]
                        data += struct.pack("<H", sum(word))
            for r in range(tile, tile + 16):
                data += _bfloat16(scales[r][g]) + _bfloat16(zeros[r][g])
    meant = [[scales[r][k // 32] * (codes[r][k] - 8) + zeros[r][k // 32] for k in range(columns)] for r in range(rows)]
    return data, None, meant


def _check_attention(kernels: Any) -> None:
    heads, queries, cached, tokens, spans = 2, 3, 200, 3, 2  # two blocks of keys per span
    for dim, rotary_dim, size in ((64, 64, 2), (64, 16, 4), (48, 48, 2), (128, 128, 4)):
        slots, scale = cached + 5, 0.7 / math.sqrt(dim)
        qkv, width = _noise(tokens * heads * (queries + 2) * dim), heads * (queries + 2) * dim
        weights = _noise(dim), _noise(dim)
        angles = [_noise(rotary_dim // 2) * 2 for _ in range(tokens)]
        stored = [[_rounded(value) for value in _noise(heads * slots * dim)] for _ in range(2)]
        contents = [b"".join(map(_bfloat16, row)) if size == 2 else bytes(_floats(row)) for row in stored]
        buffers = [ctypes.create_string_buffer(content, len(content)) for content in contents]
        partial = _floats(kernels.attention_partial(tokens, heads, queries, dim, spans))
        given, norms = _floats(qkv), [_floats(each) for each in weights]
        tables = [_floats([f(a) for row in angles for a in row]) for f in (math.cos, math.sin)]
        attention = Attention(
            query=_address(given),
            key=_address(given, heads * queries * dim),
            value=_address(given, heads * (queries + 1) * dim),
            cos=_address(tables[0]),
            sin=_address(tables[1]),
            keys=_address(buffers[0]),
            values=_address(buffers[1]),
            partial=_address(partial),
            query_norm=Norm(_address(norms[0]), None, 1e-5, 0),
            key_norm=Norm(_address(norms[1]), None, 1e-5, 0),
            head_stride=dim,
            token_stride=width,
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
        out = _floats(tokens * heads * queries * dim)
        _run(kernels, [*attend(attention), _identity(out, attention=attention, count=tokens)])
        expected: list[float] = []
        cache = [
            [_chunks(part[h * slots * dim : (h * slots + cached) * dim], dim) for h in range(heads)] for part in stored
        ]
        for t in range(tokens):
            parts = _chunks(qkv[t * width : (t + 1) * width], dim)
            cos, sin = [math.cos(a) for a in angles[t]], [math.sin(a) for a in angles[t]]
            for h in range(heads):
                new = (
                    _rotated(_normed(parts[heads * queries + h], weights[1]), cos, sin),
                    parts[heads * (queries + 1) + h],
                )
                for rows, row in zip(cache, new, strict=True):
                    rows[h].append([_rounded(value) for value in row] if size == 2 else row)
                for query in parts[h * queries : (h + 1) * queries]:
                    query = _rotated(_normed(query, weights[0]), cos, sin)
                    expected += _attended(query, cache[0][h], cache[1][h], scale)
        _compare(f"attention with heads of {dim} in {size} bytes", out, expected)


def _attended(query: list[float], keys: list[list[float]], values: list[list[float]], scale: float) -> list[float]:
    scores = [scale * sum(a * b for a, b in zip(query, row, strict=True)) for row in keys]
    shares = [math.exp(score - max(scores)) for score in scores]
    return [sum(s * row[d] for s, row in zip(shares, values, strict=True)) / sum(shares) for d in range(len(query))]


def _rotated(x: Sequence[float], cos: Sequence[float], sin: Sequence[float]) -> list[float]:
    """Return `x` with its first len(cos) elements rotated by halves."""
    half = len(cos) // 2
    low = [x[d] * cos[d] - x[d + half] * sin[d] for d in range(half)]
    high = [x[d + half] * cos[d + half] + x[d] * sin[d + half] for d in range(half)]
    return [*low, *high, *x[len(cos) :]]


def _normed(x: Sequence[float], weight: Sequence[float], bias: Sequence[float] | None = None) -> list[float]:
    """Return `x` after LayerNorm if there is a bias, else after RMSNorm."""
    mean = sum(x) / len(x) if bias is not None else 0.0
    scale = 1 / math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    return [(v - mean) * scale * w + b for v, w, b in zip(x, weight, bias or [0.0] * len(x), strict=True)]


def _check_inputs(kernels: Any) -> None:
    """Sums and norms before a product."""
    width = 72
    for is_layer_norm in (0, 1):
        x, added, more, weight, bias = rows = [_noise(width) for _ in range(5)]
        arrays = [_floats(row) for row in rows]
        norm = Norm(_address(arrays[3]), _address(arrays[4]) if is_layer_norm else None, 1e-5, is_layer_norm)
        out, total = _floats(width), _floats(width)
        operation = _identity(out, x=arrays[0], added=arrays[1], more=arrays[2], sum=total, norm=norm)
        _run(kernels, [operation])
        expected = [sum(each) for each in zip(x, added, more, strict=True)]
        _compare("a sum", total, expected)
        _compare("a norm", out, _normed(expected, weight, bias if is_layer_norm else None))


def _check_activations(kernels: Any) -> None:
    width = 72
    x, factors = [4 * value for value in _noise(width)], _noise(width)
    wanted = {
        NO_FUNCTION: x,
        SILU: [v / (1 + math.exp(-v)) for v in x],
        GELU: [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x],
    }
    for function, expected in wanted.items():
        out = _floats(width)
        _run(kernels, [_identity(out, x=_floats(x), function=function)])
        _compare("an activation", out, expected)
        scaled = [f if row == column else 0.0 for row, f in enumerate(factors) for column in range(width)]
        ones = _floats(scaled)
        _run(
            kernels,
            [_identity(out, Matrix(_address(ones), rows=width, bits=32), x=_floats(x), function=function, gated=1)],
        )
        _compare("a gate", out, [e * f * v for e, f, v in zip(expected, factors, x, strict=True)])


def _check_many_tasks(kernels: Any) -> None:
    """A chain of products, each of which needs all results of the one before."""
    width, steps = 64, 400
    rows = [[(row == (column + 1) % width) * 1.0 for column in range(width)] for row in range(width)]
    data = _floats([value for row in rows for value in row])
    chain = [_floats([float(i) for i in range(width)]), *(_floats(width) for _ in range(steps))]
    matrix = Matrix(_address(data), rows=width, bits=32)
    operations = [_product(matrix, x=x, out=out, columns=width) for x, out in itertools.pairwise(chain)]
    _run(kernels, operations, threads=3)
    _compare("a chain of products", chain[-1], [float((i - steps) % width) for i in range(width)])


def _identity(out: Any, *more: Matrix, attention: Attention | None = None, count: int = 1, **members: Any) -> Operation:
    """Return a product with the identity matrix, and `more`."""
    columns = len(out) // count
    data = _floats([float(row == column) for row in range(columns) for column in range(columns)])
    if attention is not None:
        members["attention"] = ctypes.pointer(attention)
    operation: Any = _product(
        Matrix(_address(data), rows=columns, bits=32), *more, out=out, columns=columns, count=count, **members
    )
    operation.arrays.append(data)
    found: Operation = operation
    return found


def _product(*matrices: Matrix, columns: int, count: int = 1, **members: Any) -> Any:
    """Return a product whose pointers are given as arrays; keeps the arrays alive."""
    arrays = {name: value for name, value in members.items() if isinstance(value, ctypes.Array)}
    members |= {name: _address(value) for name, value in arrays.items()}
    members.setdefault("out_stride", len(arrays["out"]) // count)
    operation: Any = product(*matrices, columns=columns, count=count, **members)
    operation.arrays = [*arrays.values()]
    return operation


def _address(array: Any, first: int = 0) -> int | None:
    """Return the address of an array's element, of bytes, or of nothing."""
    if array is None:
        return None
    if isinstance(array, bytes):
        return ctypes.cast(ctypes.c_char_p(array), ctypes.c_void_p).value
    return ctypes.addressof(array) + first * ctypes.sizeof(array._type_)


def _run(kernels: Any, operations: Sequence[Operation], threads: int = 2) -> None:
    status = kernels.run(program(operations), len(operations), threads)
    assert status == 0, "no memory"


def _noise(count: int) -> list[float]:
    return [random.gauss(0, 1) for _ in range(count)]


def _floats(values: Any) -> Any:
    """Return a C array of these numbers, or of `values` zeros."""
    return (ctypes.c_float * values)() if isinstance(values, int) else (ctypes.c_float * len(values))(*values)


def _chunks(row: list[float], size: int) -> list[list[float]]:
    return [row[first : first + size] for first in range(0, len(row), size)]


def _bfloat16(value: float) -> bytes:
    """Round to nearest, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.pack("<H", (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def _rounded(value: float) -> float:
    (number,) = struct.unpack("<f", b"\0\0" + _bfloat16(value))
    return float(number)


def _compare(what: str, actual: Any, expected: Sequence[float]) -> None:
    largest = max(abs(value) for value in expected)
    worst = max(abs(a - b) for a, b in zip(actual, expected, strict=True))
    assert worst <= TOLERANCE * largest, f"{what} is off by {worst}, of {largest}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
