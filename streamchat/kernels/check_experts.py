"""Compares the kernels' mixtures of experts with NumPy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from streamchat.kernels.check_matrices import MATRICES, noise, random_matrix
from streamchat.kernels.check_operations import address, compare, normed, run, zeros
from streamchat.kernels.operations import SCALE, SILU, SUPER_32, Experts, Matrix, Norm, compute_experts, route


def check_experts(kernels: Any) -> None:
    """Mixtures of experts, for one token and for so many that an expert has more than a block of them."""
    for bits, kind in MATRICES:
        for count in (1, 5, 150):
            _check_mixture(kernels, bits, kind, count, is_normalized=False, has_gate=False)
    for is_normalized, has_gate in ((True, False), (True, True), (False, True)):
        _check_mixture(kernels, 8, SCALE, 5, is_normalized, has_gate)


def _check_mixture(kernels: Any, bits: int, kind: int, count: int, is_normalized: bool, has_gate: bool) -> None:
    """Five experts, two of which are chosen; the shared one exists if it has a gate."""
    num, top_k, columns, width = 5, 2, 64, 96 if bits < 16 else 40
    if bits < 16 and kind >= SUPER_32:
        columns = width = 256
    (up_data, up), (down_data, down) = (
        random_matrix(bits, num * rows, size, kind) for rows, size in ((2 * width, columns), (columns, width))
    )
    up_stride, down_stride = (data.nbytes // num for data in (up_data, down_data))
    x, weight, logits = noise(count, columns), noise(columns), 3 * noise(count, num + 1)
    shared = noise(count, columns) if has_gate else None
    normalized, activated, out = zeros(count, columns), zeros(count * top_k, width), zeros(count, columns)
    shares, factors, chosen = zeros(count, top_k), zeros(count), np.zeros((count, top_k), dtype=np.int32)
    gate = Matrix(address(up_data), rows=width, bits=bits, format=kind)
    experts = Experts(
        gate,
        Matrix(gate.data + up_stride // 2, rows=width, bits=bits, format=kind),
        Matrix(address(down_data), rows=columns, bits=bits, format=kind),
        Norm(address(weight), None, 1e-5, 0),
        *(address(each) for each in (x, logits, shared, normalized, activated, out, shares, factors, chosen)),
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
    run(kernels, [route(experts), *compute_experts(experts)], threads=3)
    best = np.argsort(-logits[:, :num], axis=1)[:, :top_k]
    weights = np.exp(logits[:, :num])
    meant = np.take_along_axis(weights, best, 1)
    meant /= (meant if is_normalized else weights).sum(1, keepdims=True)
    what = f"a mixture of experts of {bits} bits for {count} tokens"
    assert (chosen == best).all(), f"{what} chose other experts"
    compare(f"a share in {what}", shares, meant)
    inputs = normed(x, weight)
    expected = np.zeros((count, columns)) if shared is None else shared / (1 + np.exp(-logits[:, num:]))
    gates, downs = up.reshape(num, 2, width, columns), down.reshape(num, columns, width)
    for token, choice in itertools.product(range(count), range(top_k)):
        expert = best[token, choice]
        g, u = gates[expert] @ inputs[token]
        expected[token] += meant[token, choice] * (downs[expert] @ (g / (1 + np.exp(np.minimum(-g, 80))) * u))
    compare(what, out, expected)
