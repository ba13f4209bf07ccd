"""Compares compiled kernels with plain Python: `python -m streamchat.kernels.check LIBRARY NUMBER`. Needs no torch.

Runs in a separate process after compilation: if the compiler used instructions that the processor lacks, only that
process dies. At the end it prints the kernels' response to challenge NUMBER, which proves that they ran.
"""

from __future__ import annotations

import ctypes
import math
import random
import struct
import sys
from collections.abc import Sequence
from typing import Any

from streamchat.kernels.operations import GELU, SILU, Activation, Attention, Norm, Product, declare, program

TOLERANCE = 2e-4
"""Largest accepted error, as a share of the largest element of a result."""


def main(path: str, number: int) -> None:
    """Print the response to challenge `number`; raise AssertionError if a kernel computes something else."""
    kernels = ctypes.CDLL(path)
    declare(kernels)
    random.seed(1)
    _check_products(kernels)
    _check_attention(kernels)
    _check_rows(kernels)
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
    product = Product(rows=len(rows), columns=len(vector), out_stride=len(rows), bits=32, count=1)
    data, scratch = _floats([value for row in rows for value in row]), _floats(kernels.product_scratch(len(vector)))
    _point(product, data=data, x=_floats(vector), bias=_floats(len(rows)), out=out, scratch=scratch)
    _run(kernels, product)
    return [int(value) for value in out]


def _check_products(kernels: Any) -> None:
    rows, columns = 48, 96
    count = 5  # four at once, and one
    x, bias = _noise(count * columns), _noise(rows)
    scratch = _floats(count * kernels.product_scratch(columns))
    for bits in (4, 8, 16, 32):
        data, scales, meant = _matrix(bits, rows, columns)
        out = _floats(count * rows)
        product = Product(rows=rows, columns=columns, out_stride=rows, bits=bits, count=count)
        _point(product, data=data, scales=scales, x=_floats(x), bias=_floats(bias), out=out, scratch=scratch)
        _run(kernels, product)
        expected = [
            bias[r] + sum(a * b for a, b in zip(meant[r], x[n * columns : (n + 1) * columns], strict=True))
            for n in range(count)
            for r in range(rows)
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
    heads, queries, cached, threads = 2, 3, 200, 2  # two blocks of keys per span
    for dim, rotary_dim, size in ((64, 64, 2), (64, 16, 4), (48, 48, 2), (128, 128, 4)):
        slots, scale = cached + 5, 0.7 / math.sqrt(dim)
        q, k, v = _noise(heads * queries * dim), _noise(heads * dim), _noise(heads * dim)
        angles = _noise(rotary_dim // 2) * 2
        cos, sin = [math.cos(a) for a in angles], [math.sin(a) for a in angles]
        stored = [[_rounded(value) for value in _noise(heads * slots * dim)] for _ in range(2)]
        contents = [b"".join(map(_bfloat16, row)) if size == 2 else bytes(_floats(row)) for row in stored]
        buffers = [ctypes.create_string_buffer(content, len(content)) for content in contents]
        out = _floats(heads * queries * dim)
        attention = Attention(
            query_stride=dim,
            key_stride=dim,
            head_stride_bytes=slots * dim * size,
            cached=cached,
            rotary_dim=rotary_dim,
            num_kv_heads=heads,
            num_kv_groups=queries,
            head_dim=dim,
            element_bytes=size,
            spans=threads,
            scale=scale,
        )
        scratch = _floats(kernels.attention_scratch(heads, queries, dim, threads))
        _point(attention, query=_floats(q), key=_floats(k), value=_floats(v), cos=_floats(cos), sin=_floats(sin))
        _point(attention, keys=buffers[0], values=buffers[1], out=out, scratch=scratch)
        _run(kernels, attention)
        expected = []
        for h in range(heads):
            at = slice(h * slots * dim, (h * slots + cached) * dim)
            rows = [_chunks(stored[i][at], dim) for i in range(2)]
            new = _rotated(k[h * dim : (h + 1) * dim], cos, sin), v[h * dim : (h + 1) * dim]
            for i in range(2):
                rows[i].append([_rounded(value) for value in new[i]] if size == 2 else list(new[i]))
            for i in range(queries):
                first = (h * queries + i) * dim
                query = _rotated(q[first : first + dim], cos, sin)
                scores = [scale * sum(a * b for a, b in zip(query, row, strict=True)) for row in rows[0]]
                shares = [math.exp(score - max(scores)) for score in scores]
                expected += [
                    sum(s * row[d] for s, row in zip(shares, rows[1], strict=True)) / sum(shares) for d in range(dim)
                ]
        _compare(f"attention with heads of {dim} in {size} bytes", out, expected)


def _rotated(x: Sequence[float], cos: Sequence[float], sin: Sequence[float]) -> list[float]:
    """Return `x` with its first len(cos) elements rotated by halves."""
    half = len(cos) // 2
    low = [x[d] * cos[d] - x[d + half] * sin[d] for d in range(half)]
    high = [x[d + half] * cos[d + half] + x[d] * sin[d + half] for d in range(half)]
    return [*low, *high, *x[len(cos) :]]


def _check_rows(kernels: Any) -> None:
    width = 72
    for is_layer_norm in (0, 1):
        rows = [_noise(width) for _ in range(5)]
        hidden, added, more, weight, bias = rows
        h, out = _floats(hidden), _floats(width)
        norm = Norm(width=width, rows=1, is_layer_norm=is_layer_norm, eps=1e-5)
        _point(norm, hidden=h, added=_floats(added), more=_floats(more), weight=_floats(weight), out=out)
        if is_layer_norm:
            _point(norm, bias=_floats(bias))
        _run(kernels, norm)
        total = [sum(each) for each in zip(hidden, added, more, strict=True)]
        mean = sum(total) / width if is_layer_norm else 0.0
        scale = 1 / math.sqrt(sum((t - mean) ** 2 for t in total) / width + 1e-5)
        expected = [
            (t - mean) * scale * w + (b if is_layer_norm else 0.0) for t, w, b in zip(total, weight, bias, strict=True)
        ]
        _compare("a sum", h, total)
        _compare("a norm", out, expected)
    # two rows of x, each followed by its row of up
    x, up = [4 * value for value in _noise(2 * width)], _noise(2 * width)
    wide = [*x[:width], *up[:width], *x[width:], *up[width:]]
    wanted = {SILU: [v / (1 + math.exp(-v)) for v in x], GELU: [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x]}
    for function, expected in wanted.items():
        out, given = _floats(2 * width), _floats(wide)
        activation = Activation(width=width, stride=2 * width, rows=2, function=function)
        _point(activation, x=given, out=out)
        _run(kernels, activation)
        _compare("an activation", out, expected)
        activation.up = ctypes.addressof(given) + width * ctypes.sizeof(ctypes.c_float)
        _run(kernels, activation)
        _compare("a gate", out, [e * u for e, u in zip(expected, up, strict=True)])


def _point(operation: Any, **members: Any) -> None:
    """Set pointers to arrays, and keep the arrays alive."""
    for name, array in members.items():
        operation.__dict__.setdefault("arrays", []).append(array)
        setattr(operation, name, ctypes.cast(array, ctypes.c_void_p))


def _run(kernels: Any, operation: ctypes.Structure) -> None:
    operations = program([operation])
    kernels.run(operations, len(operations), 2)


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
