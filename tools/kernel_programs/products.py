"""Random products: sums, norms, matrices of all formats, activations, gates."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.check_matrices import MATRICES
from streamchat.kernels.operations import GROUP, NO_FUNCTION, SOFTCAP, Attention, Norm, product
from tools.kernel_programs import bounded
from tools.kernel_programs.bounded import Bounded
from tools.kernel_programs.formats import Weights, column_unit, random_weights
from tools.kernel_programs.program import Program, Row

Array = NDArray[Any]
FUNCTIONS = range(NO_FUNCTION, SOFTCAP + 1)


@dataclass(frozen=True)
class RandomNorm:
    """A norm of rows of one width."""

    weight: Array
    bias: Array | None
    eps: float
    is_layer_norm: bool

    def place(self, program: Program) -> Norm:
        """Return the norm for the kernels."""
        give = program.memory.give
        return Norm(give(self.weight), give(self.bias), self.eps, int(self.is_layer_norm))

    def apply(self, x: Bounded) -> Bounded:
        """Return the norm of rows (n, width)."""
        return bounded.normalize(x, self.weight, self.bias, self.eps, self.is_layer_norm)


def random_norm(program: Program, width: int) -> RandomNorm:
    """Return a norm."""
    draw = program.draw
    bias = draw.plain(width) if draw.chance(0.4) else None
    return RandomNorm(draw.numbers(width), bias, draw.choose.choice((1e-5, 1e-6, 1e-12)), draw.chance(0.4))


def random_columns(program: Program, bits: int, kind: int) -> int:
    """Return a number of columns that the format permits."""
    unit, draw = column_unit(bits, kind), program.draw
    if unit == 1:
        return draw.size(1, 64, 96, most=150) if draw.chance(0.98) else 0
    return unit * draw.size(1, 2, most=6 if unit == GROUP else 2)


def random_count(program: Program) -> int:
    """Return a number of vectors."""
    draw = program.draw
    return 0 if draw.chance(0.01) else draw.size(1, 1, 1, 5, 47, 48, 49, 101, most=10)


def rounded(x: Bounded) -> Array:
    """Return the errors of vectors that are rounded to 16-bit integers, as stated in `source/round.h`."""
    groups = np.abs(x.value).reshape(len(x.value), x.value.shape[1] // GROUP, GROUP)
    error = x.error.reshape(groups.shape)
    most, least = ((groups + sign * error).max(-1, keepdims=True, initial=0.0) for sign in (1, -1))
    share = np.where(least > 1.001e-30, 0.51 / 32767, 1.0)  # smaller groups become 0
    return np.broadcast_to(most * share, groups.shape).reshape(x.value.shape)


def times(x: Bounded, weights: Weights, bias: Array | None = None) -> Bounded:
    """Return the product with a matrix."""
    if weights.is_quantized:  # sums of codes are multiplied with the scale of x first
        x = Bounded(
            x.value, np.where(np.isfinite(x.value) & (np.abs(x.value) > bounded.LARGE / 2**13), np.inf, x.error)
        )
    found = bounded.dot(x, weights.value, weights.size, rounded(x) if weights.is_quantized else None)
    return found if bias is None else bounded.add(found, Bounded.of(np.broadcast_to(bias, found.value.shape)))


def append_product(program: Program, given: Row | None = None, attention: tuple[int, Bounded] | None = None) -> Row:
    """Append a random product; return its result.

    Args:
        program: The program.
        given: The input; None for new numbers.
        attention: Address of an attention whose combined result is the input, and that result.
    """
    draw, memory = program.draw, program.memory
    source = attention[1] if attention else given.value if given else None
    formats = [draw.choose.choice(MATRICES) for _ in range(draw.size(1, 1, 2, 3))]
    if source is None:
        count, columns = random_count(program), max(random_columns(program, *each) for each in formats)
    else:
        count, columns = source.value.shape
    formats = [each for each in formats if columns and columns % column_unit(*each) == 0] or [(32, 2)]
    members, x = _input(program, given, attention, count, columns)
    gated = draw.chance(0.3)
    rows = [draw.size(1, 15, 16, 17, 33, most=60) for _ in formats]
    if len(rows) > 1 and draw.chance(0.05):
        rows[-1] = 0
    if gated:
        formats, rows = [formats[0], formats[-1]], [rows[0]] * 2
    made = [random_weights(draw, *each, number, columns) for each, number in zip(formats, rows, strict=True)]
    biases = [draw.numbers(number) if draw.chance(0.3) else None for number in rows]
    function, softcap = (
        draw.choose.choice(FUNCTIONS) if draw.chance(0.6) else NO_FUNCTION,
        draw.choose.choice((1.5, 30.0)),
    )
    parts = [times(x, each, bias) for each, bias in zip(made, biases, strict=True)]
    results = [bounded.activate(function, part, softcap) for part in parts]
    if gated:
        results = [bounded.multiply(results[0], parts[1])]
    width = sum(part.value.shape[1] for part in results)
    stride = width + draw.choose.choice((0, 0, 3))
    out, number = memory.receive(count, stride)
    matrices = [each.place(memory, bias) for each, bias in zip(made, biases, strict=True)]
    program.operations.append(
        product(
            *matrices,
            out=out,
            columns=columns,
            count=count,
            out_stride=stride,
            function=function,
            softcap=softcap,
            gated=int(gated),
            **members,
        )
    )
    value = Bounded(*(np.concatenate(each, 1) for each in zip(*((r.value, r.error) for r in results), strict=True)))
    names = [f"{each.rows}x{columns} of {each.bits} bits, format {each.kind}" for each in made]
    program.expect(f"product of {count} vectors with {' and '.join(names)}, function {function}", number, value, width)
    return Row(out if stride == width else 0, value)


def _input(
    program: Program, given: Row | None, attention: tuple[int, Bounded] | None, count: int, columns: int
) -> tuple[dict[str, Any], Bounded]:
    """Return the members for the input of a product, and its value."""
    draw, memory = program.draw, program.memory
    members: dict[str, Any] = {"added_scale": draw.choose.choice((1.0, 1.0, 0.22))}
    if attention:
        members["attention"] = ctypes.cast(attention[0], ctypes.POINTER(Attention))
        x = attention[1]
    elif given:
        members["x"], x = given.address, given.value
    else:
        numbers = draw.numbers(count, columns)
        members["x"], x = memory.give(numbers), Bounded.of(numbers)
    scale = float(np.float32(members["added_scale"]))
    if draw.chance(0.3):
        added = draw.numbers(count, columns)
        members["added"], value = memory.give(added), Bounded.of(added)
        if draw.chance(0.3):
            norm = random_norm(program, columns)
            members["added_norm"], value = norm.place(program), norm.apply(value)
        x = bounded.add(x, value, scale)
    if draw.chance(0.2):
        more = draw.numbers(count, columns)
        members["more"], x = memory.give(more), bounded.add(x, Bounded.of(more), scale)
    if draw.chance(0.3):
        members["sum"], number = memory.receive(count, columns)
        program.expect("sum", number, x)
    if draw.chance(0.4):
        norm = random_norm(program, columns)
        members["norm"], x = norm.place(program), norm.apply(x)
    return members, x
