"""Compares the kernels' moves of cached keys and values with NumPy. Needs no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamchat.kernels.check_codes import CachedPair, random_pair
from streamchat.kernels.check_matrices import noise, stored, values
from streamchat.kernels.check_operations import Array, address, compare, zeros
from streamchat.kernels.operations import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, Move


@dataclass(frozen=True)
class _Case:
    """Heads whose `pairs` of elements from `first` on are rotated."""

    kind: int
    dim: int
    pairs: int
    first: int = 0
    is_interleaved: int = 0


_CASES = (
    _Case(BFLOAT16, 64, 32),
    _Case(FLOAT16, 48, 8, first=4, is_interleaved=1),
    _Case(FLOAT32, 80, 16),
    _Case(FLOAT32, 20, 0),
    _Case(INT8, 64, 32),
    _Case(INT8, 7, 2, first=1, is_interleaved=1),
    _Case(INT4, 80, 40),
    _Case(INT4, 128, 0),
)


def check_moves(kernels: Any) -> None:
    """Raise AssertionError if slots or originals differ from NumPy's."""
    for case, searches in itertools.product(_CASES, (0, 1)):
        _check(kernels, case, searches)


def _check(kernels: Any, case: _Case, searches: int) -> None:
    heads, slots, first, tokens = 3, 9, 2, 5
    pair = random_pair(case.kind, heads, slots, case.dim, 1.0)
    rows, scales = pair.data[0], None if pair.scales is None else pair.scales[0]
    angles = noise(tokens, case.pairs)
    originals = zeros(heads, tokens, case.dim)
    cos, sin = np.cos(angles), np.sin(angles)
    move = Move(
        originals=address(originals),
        slots=address(rows[:, first:]),
        scales=None if scales is None else address(scales[:, first:]),
        cos=address(cos) if case.pairs else None,
        sin=address(sin) if case.pairs else None,
        original_stride=tokens * case.dim,
        head_stride_bytes=rows.strides[0],
        scale_stride=slots,
        heads=heads,
        tokens=tokens,
        dim=case.dim,
        first_dim=case.first,
        pairs=case.pairs,
        is_interleaved=case.is_interleaved,
        format=case.kind,
        searches=searches,
    )
    moves = (Move * 1)(move)
    before = pair.numbers()[0]
    assert kernels.read_slots(moves, 1, 1) == 0
    compare("keys without positions", originals, _rotated(before[:, first : first + tokens], case, -angles))
    originals[:] = noise(*originals.shape)
    assert kernels.write_slots(moves, 1, 1) == 0
    expected = _rotated(originals, case, angles)
    after = pair.numbers()[0]
    moved, outside = after[:, first : first + tokens], np.delete(after, np.s_[first : first + tokens], 1)
    assert (outside == np.delete(before, np.s_[first : first + tokens], 1)).all(), "other slots have changed"
    if scales is None:
        compare("moved keys", moved, values(stored(expected, case.kind)), 1e-6 if case.kind == FLOAT32 else 5e-3)
    else:
        _compare_codes(pair, moved, expected, first, searches)


def _compare_codes(pair: CachedPair, moved: Array, expected: Array, first: int, searches: int) -> None:
    """The best of several scales clips the largest numbers; its errors are still small on the whole."""
    errors = moved - expected
    if searches:
        share = np.sqrt(np.mean(errors**2) / np.mean(expected**2))
        assert share < 0.2, f"moved codes are off by {share} of the numbers"
    else:
        step = pair.step()[0, :, first : first + expected.shape[1]]
        assert (np.abs(errors) <= step).all(), "moved codes do not stand for the numbers"


def _rotated(x: Array, case: _Case, angles: Array) -> Array:
    """Return heads (heads, tokens, dim) with some elements rotated by angles (tokens, pairs)."""
    out, stop = x.astype(np.float32).copy(), case.first + 2 * case.pairs
    part = out[..., case.first : stop]
    a, b = (
        (part[..., ::2].copy(), part[..., 1::2].copy())
        if case.is_interleaved
        else (part[..., : case.pairs].copy(), part[..., case.pairs :].copy())
    )
    both = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    if case.is_interleaved:
        part[..., ::2], part[..., 1::2] = both
    else:
        part[..., : case.pairs], part[..., case.pairs :] = both
    return out
