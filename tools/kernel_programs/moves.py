"""Random moves of cached slots: calls of `write_slots` and `read_slots`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from streamchat.kernels.operations import BFLOAT16, MAX_HEAD_DIM, Move
from tools.kernel_programs import bounded
from tools.kernel_programs.bounded import Bounded
from tools.kernel_programs.caches import SINGLE, Cache, one_cache
from tools.kernel_programs.coded import Coded
from tools.kernel_programs.formats import encode
from tools.kernel_programs.memory import READ_SLOTS, WRITE_SLOTS
from tools.kernel_programs.numbers import Draw
from tools.kernel_programs.program import Program
from tools.kernel_programs.rows import Choices, Rows

Array = NDArray[Any]


@dataclass(frozen=True)
class Range:
    """The sizes and options of a move."""

    kind: int
    searches: bool
    dim: int
    heads: int
    tokens: int
    first_dim: int
    pairs: int
    is_interleaved: bool
    is_rotated: bool

    @property
    def cache(self) -> Cache:
        return one_cache(self.kind, self.searches)


def random_range(draw: Draw) -> Range:
    """Return sizes and options."""
    kind, searches = draw.choose.choice(SINGLE), draw.chance(0.5)
    unit = one_cache(kind).unit
    dim = unit * -(-draw.size(64, 64, 80, 128, MAX_HEAD_DIM, most=MAX_HEAD_DIM if draw.chance(0.3) else 40) // unit)
    pairs = draw.choose.choice((dim // 2, dim // 2, draw.choose.randint(0, dim // 2)))
    return Range(
        kind,
        searches,
        dim,
        heads=0 if draw.chance(0.01) else draw.size(1, 2, 3, most=6),
        tokens=0 if draw.chance(0.04) else draw.size(1, 2, 70, most=9),
        first_dim=draw.choose.choice((0, dim - 2 * pairs, draw.choose.randint(0, dim - 2 * pairs))),
        pairs=pairs,
        is_interleaved=draw.chance(0.4),
        is_rotated=draw.chance(0.7),
    )


def append_moves(program: Program) -> None:
    """Make this a program of one call that moves ranges of slots."""
    draw, memory = program.draw, program.memory
    count, writes = 0 if draw.chance(0.02) else draw.size(1, 2, most=4), draw.chance(0.5)
    memory.move(WRITE_SLOTS if writes else READ_SLOTS, [_random_move(program, writes) for _ in range(count)])


@dataclass(frozen=True)
class _Strided:
    """Heads in memory that they share with others: a flat array, and the part of it that is theirs."""

    flat: Array
    first: int
    heads: int
    stride: int
    used: int

    @classmethod
    def random(cls, draw: Draw, rows: Array, more: int) -> _Strided:
        """Return heads (heads, ...) with up to `more` random elements before and between them."""
        heads, used = len(rows), rows[0].size if len(rows) else 0
        first, gap = draw.choose.choice((0, 0, 1, more)), draw.choose.choice((0, 1, more))
        size = first + heads * used + max(0, heads - 1) * gap
        noise = draw.arrays.integers(0, 256, size * rows.itemsize, np.uint8).view(rows.dtype)
        found = cls(noise, first, heads, used + gap, used)
        found.heads_of(noise)[:] = rows.reshape(heads, used)
        return found

    def heads_of(self, flat: Array) -> Array:
        """Return the heads (heads, elements) of an array like `flat`."""
        size = flat.itemsize
        return as_strided(flat[self.first :], (self.heads, self.used), (self.stride * size, size))

    def is_changed_outside(self, now: Array) -> bool:
        """Return whether `now` differs from `flat` before, after, or between the heads."""
        both = [each.copy() for each in (self.flat, now)]
        for each in both:
            self.heads_of(each)[:] = 0
        return both[0].tobytes() != both[1].tobytes()


def _random_move(program: Program, writes: bool) -> Move:
    draw, memory, m = program.draw, program.memory, random_range(program.draw)
    numbers, rows = draw.numbers(m.heads, m.tokens, m.dim, scale=draw.choose.choice((1.0, 3.0))), _random_rows(draw, m)
    cos, sin = (draw.plain(m.tokens, m.pairs) if m.is_rotated else None for _ in range(2))
    arrays = dict(zip(("originals", "slots", "scales"), (numbers, *rows.arrays), strict=False))
    parts = {name: _Strided.random(draw, array, 2 * array.shape[-1]) for name, array in arrays.items()}
    at, regions = {}, {}
    for name, part in parts.items():
        if (name != "originals") == writes:
            start, regions[name] = memory.share(part.flat)
        else:
            start = memory.constant(part.flat)
        at[name] = start + part.first * part.flat.itemsize
    if writes:
        expected = m.cache.choices(_rotated(m, Bounded.of(numbers), cos, sin, 1.0))
    else:
        expected = Choices.only(_rotated(m, m.cache.loaded(rows), cos, sin, -1.0))

    def check(found: dict[int, Array]) -> str:
        now = {name: found[number] for name, number in regions.items()}
        if any(parts[name].is_changed_outside(flat) for name, flat in now.items()):
            return "wrote before, between, or after the heads"
        heads = [parts[name].heads_of(flat).reshape(arrays[name].shape) for name, flat in now.items()]
        return expected.difference(m.cache.decode(Rows(heads)) if writes else heads[0])

    program.require(f"{'slots' if writes else 'originals'} of {m}", check)
    return Move(
        **at,
        cos=memory.give(cos),
        sin=memory.give(sin),
        original_stride=parts["originals"].stride,
        head_stride_bytes=parts["slots"].stride * parts["slots"].flat.itemsize,
        scale_stride=parts["scales"].stride if "scales" in parts else 0,
        heads=m.heads,
        tokens=m.tokens,
        dim=m.dim,
        first_dim=m.first_dim,
        pairs=m.pairs,
        is_interleaved=m.is_interleaved,
        format=m.kind,
        searches=m.searches,
    )


def _random_rows(draw: Draw, m: Range) -> Rows:
    """Return stored heads: those of random numbers, or any codes with any scales."""
    cache, numbers = m.cache, draw.numbers(m.heads, m.tokens, m.dim)
    if not isinstance(cache, Coded) or draw.chance(0.5):
        return cache.encode(numbers)
    codes = draw.arrays.integers(-cache.limit - 1, cache.limit + 1, numbers.shape, np.int8)
    scales = np.abs(draw.numbers(m.heads, m.tokens, scale=0.1))
    return cache.packed(codes, encode(BFLOAT16, scales))


def _rotated(m: Range, x: Bounded, cos: Array | None, sin: Array | None, direction: float) -> Bounded:
    """Return heads (heads, tokens, dim) of which some elements are rotated by the angles of their token, or back."""
    if cos is None or sin is None:
        return x
    start, stop = m.first_dim, m.first_dim + 2 * m.pairs
    repeat = (lambda each: each.repeat(2, -1)) if m.is_interleaved else (lambda each: np.tile(each, 2))
    turned = bounded.rotate(
        x[..., start:stop], repeat(cos).astype(float), direction * repeat(sin).astype(float), m.is_interleaved
    )
    value, error = x.value.copy(), x.error.copy()
    value[..., start:stop], error[..., start:stop] = turned.value, turned.error
    return Bounded(value, error)
