"""Random mixtures of experts."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.check_matrices import MATRICES
from streamchat.kernels.operations import RELU2, SILU, Experts, Matrix, Norm, compute_experts, route
from tools.kernel_programs import bounded
from tools.kernel_programs.bounded import Bounded
from tools.kernel_programs.formats import Weights, column_unit, random_weights
from tools.kernel_programs.products import random_norm, times
from tools.kernel_programs.program import Program, Row

Array = NDArray[Any]


@dataclass(frozen=True)
class Mixture:
    """Sizes and options of a mixture of experts."""

    num: int
    top_k: int
    count: int
    columns: int
    width: int
    bits: int
    kind: int
    function: int
    is_normalized: bool
    has_gate: bool


def random_mixture(program: Program) -> Mixture:
    """Return sizes and options."""
    draw = program.draw
    bits, kind = draw.choose.choice(MATRICES)
    unit, num = column_unit(bits, kind), draw.size(1, 2, 8, most=9)
    columns, width = ((unit * draw.size(1, 2, 1) if unit > 1 else draw.size(16, 64, most=70)) for _ in range(2))
    if unit > 64:
        columns = width = unit
    return Mixture(
        num,
        draw.choose.randint(1, min(num, 4)),
        0 if draw.chance(0.01) else draw.size(1, 1, 5, 60, most=9),
        columns,
        width,
        bits,
        kind,
        draw.choose.randint(SILU, RELU2),
        draw.chance(0.5),
        draw.chance(0.4),
    )


def append_experts(program: Program) -> Row:
    """Append a random mixture of experts; return its result."""
    draw, memory, m = program.draw, program.memory, random_mixture(program)
    up = [random_weights(draw, m.bits, m.kind, 2 * m.width, m.columns) for _ in range(m.num)]
    down = [random_weights(draw, m.bits, m.kind, m.columns, m.width) for _ in range(m.num)]
    up_data, down_data = (memory.give(np.stack([each.data for each in part])) for part in (up, down))
    assert up_data is not None
    half = up[0].data.nbytes // 2
    x, logits = draw.numbers(m.count, m.columns), _logits(program, m)
    shared = draw.numbers(m.count, m.columns) if draw.chance(0.5) else None
    norm = random_norm(program, m.columns) if draw.chance(0.6) else None
    normed, shares, out = (memory.receive(m.count, width) for width in (m.columns, m.top_k, m.columns))
    activated, factors = memory.receive(m.count * m.top_k, m.width), memory.receive(m.count)
    chosen = memory.receive(m.count, m.top_k, dtype=np.int32)
    experts = Experts(
        Matrix(up_data, None, m.width, m.bits, m.kind),
        Matrix(up_data + half, None, m.width, m.bits, m.kind),
        Matrix(down_data, None, m.columns, m.bits, m.kind),
        norm.place(program) if norm else Norm(),
        *(memory.give(each) for each in (x, logits, shared)),
        *(each for each, _ in (normed, activated, out, shares, factors, chosen)),
        columns=m.columns,
        up_stride=2 * half,
        down_stride=down[0].data.nbytes,
        logits_stride=logits.shape[1],
        num_experts=m.num,
        top_k=m.top_k,
        count=m.count,
        function=m.function,
        is_normalized=m.is_normalized,
        has_gate=m.has_gate,
    )
    at = memory.structure(experts)
    for operation in (route(experts), *compute_experts(experts)):
        operation.each.experts = ctypes.cast(at, ctypes.POINTER(Experts))
        program.operations.append(operation)
    given = Bounded.of(x)
    inputs = norm.apply(given) if norm else given
    best, share = routed(m, logits)
    value = _mixed(m, inputs, best, share, up, down)
    if shared is not None:
        factor = bounded.sigmoid(Bounded.of(logits[:, m.num : m.num + 1])) if m.has_gate else None
        more = Bounded.of(shared)
        value = with_shared(m, value, bounded.multiply(more, factor) if factor else more)
    what = f"of {m}"
    program.require(f"chosen experts {what}", _chosen_check(m, logits, best, chosen[1]))
    program.expect(f"shares {what}", shares[1], share)
    program.expect(f"normalized input {what}", normed[1], inputs)
    program.expect(f"result {what}", out[1], value)
    return Row(out[0], value)


def with_shared(m: Mixture, mixed: Bounded, shared: Bounded) -> Bounded:
    """Return the sum of both: the kernels add the result of each chosen expert to `shared`, and round each time."""
    rounding = m.top_k * bounded.EPS * np.abs(shared.value)
    return bounded.add(mixed, Bounded(shared.value, shared.error + rounding))


def _logits(program: Program, m: Mixture) -> Array:
    """Return logits (count, experts and a gate), some of them equal."""
    draw = program.draw
    logits = draw.numbers(m.count, m.num + 1 + draw.choose.choice((0, 2)), scale=3.0)
    return np.round(logits) if draw.chance(0.2) else logits


def routed(m: Mixture, logits: Array) -> tuple[Array, Bounded]:
    """Return the experts of each token, (count, top_k), best first, and their shares."""
    used = logits[:, : m.num].astype(float)
    best = np.argsort(-used, axis=1, kind="stable")[:, : m.top_k]
    top = np.take_along_axis(used, best, 1)
    powers = np.exp(top - top[:, :1])
    total = (powers if m.is_normalized else np.exp(used - top[:, :1])).sum(1, keepdims=True)
    shares = powers / total
    depth = np.minimum(top[:, :1] - top, 90)
    error = shares * (1e-5 + 4 * bounded.EPS * depth) + 2.0**-120
    odd = _is_odd(m, logits)
    return best, bounded.bound(np.where(odd, 0.0, shares), np.where(odd, np.inf, error))


def _is_odd(m: Mixture, logits: Array) -> Array:
    """Return which tokens, (count, 1), may have any experts, because a logit is NaN or the largest is infinite."""
    used = logits[:, : m.num]
    is_odd: Array = np.isnan(used) | np.isposinf(used)
    return np.asarray(is_odd.any(1, keepdims=True) | np.isneginf(used).all(1, keepdims=True))


def _chosen_check(m: Mixture, logits: Array, best: Array, number: int) -> Any:
    def check(found: dict[int, Array]) -> str:
        chosen = found[number]
        if ((chosen < 0) | (chosen >= m.num)).any():
            return f"no such expert: {chosen.tolist()}"
        if (np.diff(np.sort(chosen, 1), axis=1) == 0).any():
            return f"an expert twice: {chosen.tolist()}"
        wrong = ((chosen != best) & ~np.isnan(logits[:, : m.num]).any(1, keepdims=True)).any(1)
        return f"{chosen[wrong][0].tolist()} instead of {best[wrong][0].tolist()}" if wrong.any() else ""

    return check


def _mixed(m: Mixture, inputs: Bounded, best: Array, share: Bounded, up: list[Weights], down: list[Weights]) -> Bounded:
    """Return the combined results of the chosen experts, (count, columns)."""
    value, error = np.zeros((m.count, m.columns)), np.zeros((m.count, m.columns))
    for expert in range(m.num):
        tokens, choices = np.nonzero(best == expert)
        if not len(tokens):
            continue
        both = times(inputs[tokens], up[expert])
        gate = bounded.activate(m.function, both[:, : m.width], 0.0)
        part = times(bounded.multiply(gate, both[:, m.width :]), down[expert])
        part = bounded.multiply(part, share[tokens, choices][:, None])
        value[tokens] += part.value
        error[tokens] += part.error + (2 + m.top_k) * bounded.EPS * np.abs(part.value)
    odd = np.isinf(share.error).any(1, keepdims=True)
    return bounded.bound(np.where(odd, 0.0, value), np.where(odd, np.inf, error))
