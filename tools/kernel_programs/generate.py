"""Generates random programs of all operations."""

from __future__ import annotations

import numpy as np

from streamchat.kernels.check_matrices import MATRICES
from tools.kernel_programs.attentions import append_attention
from tools.kernel_programs.bounded import EPS, Bounded, difference
from tools.kernel_programs.experts import append_experts
from tools.kernel_programs.formats import NUMBERS, column_unit, decode, encode, random_weights, store
from tools.kernel_programs.memory import Memory
from tools.kernel_programs.moves import append_moves
from tools.kernel_programs.numbers import Draw
from tools.kernel_programs.products import append_product
from tools.kernel_programs.program import Program, Row

KINDS = {"product": 8, "attention": 7, "experts": 3, "dequantize": 2, "moves": 4}
"""What programs begin with, and how often."""


def random_program(seed: int, number: int) -> Program:
    """Return program `number` of a seed."""
    draw = Draw.of(seed, number)
    threads = draw.choose.choice((1, 1, 1, 2, 2, 3, 4, 7)) if draw.chance(0.995) else draw.choose.choice((33, 300))
    program = Program(draw, Memory(draw.choose, threads, draw.chance(0.5)))
    with np.errstate(all="ignore"):
        _fill(program, draw.choose.choices(list(KINDS), list(KINDS.values()))[0])
    return program


def _fill(program: Program, kind: str) -> None:
    if kind == "dequantize":
        _append_rows(program)
        return
    if kind == "moves":
        append_moves(program)
        return
    row: Row | None = None
    if kind == "attention":
        row = append_product(program, attention=append_attention(program))
    elif kind == "experts":
        row = append_experts(program)
    while row is None or (row.address and row.value.value.size and program.draw.chance(0.3)):
        row = append_product(program, row)
    program.memory.run(program.operations)


def _append_rows(program: Program) -> None:
    """Append the conversion of rows of a matrix of codes to numbers."""
    draw, memory = program.draw, program.memory
    bits, kind = draw.choose.choice([each for each in MATRICES if each[0] < 16])
    rows, columns = draw.size(1, 16, 17, most=70), column_unit(bits, kind) * draw.size(1, 2, most=3)
    weights, number = random_weights(draw, bits, kind, rows, columns), draw.choose.choice(list(NUMBERS))
    count = 0 if draw.chance(0.05) else draw.size(1, 2, most=6)
    first, ids = 0, None
    if draw.chance(0.5):
        ids = draw.arrays.integers(0, rows, count)
    else:
        count = min(count, rows)
        first = draw.choose.randint(0, rows - count)
    chosen = np.arange(first, first + count) if ids is None else ids
    out, region = memory.receive(count, columns, dtype=encode(number, draw.plain(1)).dtype)
    memory.dequantize(weights.place(memory, None), columns, memory.give(ids), first, count, number, out)
    value, size = weights.value[chosen], weights.size[chosen]
    expected = store(number, Bounded(value, np.where(np.isfinite(size), 3 * EPS * size, 0.0)))
    what = f"{count} rows of {rows}x{columns} of {bits} bits, format {kind}, as {number}"
    program.require(what, lambda found: difference(decode(number, found[region]), expected))
