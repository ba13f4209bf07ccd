"""Parts of the Triton kernel of attention for keys and values in 8 or 4 bits; see `streamchat.cache.layers.codes`.

Scales are bfloat16 in memory. The kernels read and write their 16 bits as integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from streamchat.cache.layers import codes

EIGHT_LIMIT = tl.constexpr(codes.LIMITS[8])
FOUR_LIMIT = tl.constexpr(codes.LIMITS[4])
ZERO = tl.constexpr(codes.ZERO)
ZEROS = tl.constexpr(codes.ZERO << 4 | codes.ZERO)
TINY = tl.constexpr(codes.TINY)
INFINITY = tl.constexpr(float("inf"))
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 to which a small number is added is rounded to an integer, half to even."""
LARGEST_MATRIX = tl.constexpr(16)
"""Columns; larger ones take too many registers."""


@triton.jit
def turned(x, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Multiply each part of SIZE columns of `x`, (ROWS, COLUMNS) float32, by a Hadamard matrix.

    A product with a matrix of 16 columns on tensor cores, in three parts of TF32, then sums and differences. ROWS and
    COLUMNS are at least 16.
    """
    matrix: tl.constexpr = SIZE if SIZE < LARGEST_MATRIX else LARGEST_MATRIX
    if matrix >= 16:
        i = tl.arange(0, matrix)
        common = i[:, None] & i[None, :]
        common ^= common >> 4
        # bit n of 0x6996 is the parity of the four bits of n
        signs = 1.0 - 2.0 * ((0x6996 >> (common & 15)) & 1).to(tl.float32)
        parts = tl.reshape(x, (ROWS * COLUMNS // matrix, matrix))
        x = tl.reshape(tl.dot(parts, signs, input_precision="tf32x3"), (ROWS, COLUMNS))
    column = tl.arange(0, COLUMNS)[None, :] + tl.zeros((ROWS, COLUMNS), tl.int32)
    for i in tl.static_range(8):
        if (1 << i) < SIZE and ((1 << i) >= matrix or matrix < 16):
            other = tl.gather(x, column ^ (1 << i), 1)
            x = tl.where((column & (1 << i)) > 0, other - x, x + other)
    return x * (SIZE**-0.5)


@triton.jit
def rounded(x, BITS: tl.constexpr):
    """Return int32 codes of turned heads `x`, (heads, columns), and float32 scales (heads,), rounded up to bfloat16."""
    limit: tl.constexpr = EIGHT_LIMIT if BITS == 8 else FOUR_LIMIT
    largest = tl.max(tl.abs(x), 1)
    has_nan = tl.max((x != x).to(tl.int32), 1) > 0
    scale = tl.div_rn(tl.where(largest < TINY, 0.0, largest), tl.full(largest.shape, limit, tl.float32))
    up = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    scale = tl.where(scale < INFINITY, up, scale)
    scale = tl.where(has_nan, float("nan"), scale)
    usable = (scale > 0.0) & (scale < INFINITY)
    inverse = tl.where(usable, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(usable, scale, 1.0)), 0.0)
    scaled = tl.where(usable[:, None], x * inverse[:, None], 0.0)
    return ((scaled + MAGIC) - MAGIC).to(tl.int32), scale


@triton.jit
def store_codes(to, scales, slot, x, BITS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Store a turned head, (1, PADDED_DIM), in a slot; return what is stored, as turned float32 numbers.

    to, scales: The codes and scales of a head of the cache.
    """
    found, scale = rounded(x, BITS)
    tl.store(scales + slot + tl.arange(0, 1), (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16))
    d = tl.arange(0, PADDED_DIM)[None, :]
    if BITS == 8:
        tl.store(to + slot * DIM + d, found.to(tl.int8), mask=d < DIM)
    else:
        half: tl.constexpr = DIM // 2
        j = tl.arange(0, PADDED_DIM // 2)[None, :]
        low = tl.gather(found, j, 1) + ZERO
        high = tl.gather(found, tl.minimum(j + half, PADDED_DIM - 1), 1) + ZERO
        tl.store(to + slot * half + j, (low | (high << 4)).to(tl.uint8), mask=j < half)
    return found.to(tl.float32) * scale[:, None]


@triton.jit
def load_codes(data, slot, exists, BITS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Return the codes of some slots of a head, (slots, PADDED_DIM) integers.

    slot, exists: (slots,).
    """
    d = tl.arange(0, PADDED_DIM)[None, :]
    mask = exists[:, None] & (d < DIM)
    if BITS == 8:
        found = tl.load(data + slot.to(tl.int64)[:, None] * DIM + d, mask=mask, other=0)
    else:
        half: tl.constexpr = DIM // 2
        # each byte is read twice, for the first half of the head and for the second
        both = tl.load(data + slot.to(tl.int64)[:, None] * half + d % half, mask=mask, other=ZEROS).to(tl.int32)
        found = ((both >> tl.where(d < half, 0, 4)) & 15) - ZERO
    return found


@triton.jit
def load_scales(data, slot, exists):
    """Return the float32 scales of some slots of a head; 0 where no slot exists."""
    bits = tl.load(data + slot, mask=exists, other=0).to(tl.int32)
    return (bits << 16).to(tl.float32, bitcast=True)
