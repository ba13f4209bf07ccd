"""Compares compiled kernels with NumPy: `python -m streamchat.kernels.check LIBRARY NUMBER`. Needs no torch.

Runs in a separate process after compilation: if the compiler used instructions that the processor lacks, only that
process dies. At the end it prints the kernels' response to challenge NUMBER, which proves that they ran.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
from typing import Any

import numpy as np

from streamchat.kernels.check_attention import check_attention
from streamchat.kernels.check_experts import check_experts
from streamchat.kernels.check_matrices import MATRICES, noise, random_matrix, stored, values
from streamchat.kernels.check_moves import check_moves
from streamchat.kernels.check_operations import Array, address, array_product, compare, identity, normed, run, zeros
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
    Matrix,
    Norm,
    declare,
)


def main(path: str, number: int) -> None:
    """Print the response to challenge `number`; raise AssertionError if a kernel computes something else."""
    kernels = ctypes.CDLL(path)
    declare(kernels)
    _check_products(kernels)
    _check_rows(kernels)
    _check_inputs(kernels)
    _check_activations(kernels)
    check_experts(kernels)
    _check_many_tasks(kernels)
    check_moves(kernels)
    check_attention(kernels)
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
    out, data = zeros(1, len(matrix)), matrix.astype(np.float32)
    given = Matrix(address(data), rows=len(matrix), bits=32)
    run(kernels, [array_product(given, x=vector.astype(np.float32), out=out, columns=len(vector))])
    return [int(value) for value in out[0]]


def _check_products(kernels: Any) -> None:
    counts, sizes = (61, 101), (48, 23)  # two blocks of vectors and four, of full panels and others
    for (bits, kind), count in itertools.product(MATRICES, counts):
        columns = 512 if bits < 16 and kind >= SUPER_32 else 160
        x = noise(count, columns)
        made = [random_matrix(bits, rows, columns, kind) for rows in sizes]
        biases = [noise(rows) for rows in sizes]
        matrices = [
            Matrix(address(data), address(bias), rows, bits, kind)
            for (data, _), bias, rows in zip(made, biases, sizes, strict=True)
        ]
        out = zeros(count, sum(sizes))
        run(kernels, [array_product(*matrices, x=x, out=out, columns=columns)])
        meant = np.concatenate([weights for _, weights in made])
        what = f"a product of {count} vectors, weights of {bits} bits, format {kind}"
        compare(what, out, x @ meant.T + np.concatenate(biases))


def _check_rows(kernels: Any) -> None:
    """Rows of matrices of codes as numbers."""
    ids = np.array([17, 0, 39, 22], np.int64)
    for bits, kind in MATRICES:
        if bits >= 16:
            continue
        data, weights = random_matrix(bits, 40, 512, kind)
        matrix = Matrix(address(data), None, 40, bits, kind)
        for number in (BFLOAT16, FLOAT16, FLOAT32):
            out = stored(zeros(4, 512), number)
            kernels.dequantize(ctypes.byref(matrix), 512, address(ids), 0, 4, number, address(out))
            expected = values(stored(weights[ids].astype(np.float32), number))
            # codes times scales may round to the other neighbor
            compare(f"rows of {bits} bits, format {kind}", values(out), expected, 1e-6 if number == FLOAT32 else 5e-3)


def _check_inputs(kernels: Any) -> None:
    """Sums and norms before a product."""
    width = 72
    for is_layer_norm in (0, 1):
        x, added, more, weight, bias = noise(5, width)
        norm = Norm(address(weight), address(bias) if is_layer_norm else None, 1e-5, is_layer_norm)
        out, total, biases = zeros(1, width), zeros(width), bias if is_layer_norm else None
        run(kernels, [identity(out, x=x, added=added, more=more, sum=total, norm=norm)])
        compare("a sum", total, x + added + more)
        compare("a norm", out, normed(x + added + more, weight, biases))
        run(kernels, [identity(out, x=x, added=added, more=more, added_scale=0.3, added_norm=norm, sum=total)])
        compare("a sum with factor and norm", total, x + 0.3 * (normed(added, weight, biases) + more))
        compare("the input of a product", out, total)


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
        out = zeros(1, width)
        run(kernels, [identity(out, x=x, function=function, softcap=softcap)])
        compare("an activation", out, expected, tolerance=1e-5)
        gate = Matrix(address(diagonal), rows=width, bits=32)
        run(kernels, [identity(out, gate, x=x, function=function, softcap=softcap, gated=1)])
        compare("a gate", out, expected * factors * x)


def _check_many_tasks(kernels: Any) -> None:
    """A chain of products, each of which needs all results of the one before."""
    width, steps = 64, 400
    data = np.roll(np.eye(width, dtype=np.float32), 1, axis=0)
    chain = zeros(steps + 1, 1, width)
    chain[0] = np.arange(width)
    matrix = Matrix(address(data), rows=width, bits=32)
    operations = [array_product(matrix, x=x, out=out, columns=width) for x, out in itertools.pairwise(chain)]
    run(kernels, operations, threads=3)
    compare("a chain of products", chain[-1], np.roll(np.arange(width), steps))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
