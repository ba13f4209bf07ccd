"""The Triton kernel of a product with quantized weights in tiles; `kernels/source/tiles.h` describes the bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from streamchat.decode.fused.kernel_parts import (
    LAYER_NORM,
    RMS_NORM,
    finish,
    matrix_of,
    moments,
    normalized,
    summed,
    summed_moments,
)
from streamchat.kernels import operations

SCALE_MIN = tl.constexpr(operations.SCALE_MIN)
SUPER_32 = tl.constexpr(operations.SUPER_32)
SUPER_16 = tl.constexpr(operations.SUPER_16)
TILE = tl.constexpr(operations.TILE)
GROUP = tl.constexpr(operations.GROUP)
SUPERBLOCK = tl.constexpr(operations.SUPERBLOCK)
HEADER = tl.constexpr(operations.HEADER)


@triton.jit
def block_at(group, BITS: tl.constexpr, SCALES: tl.constexpr):
    """Return the offset of the codes of a group in its tile, in bytes."""
    if SCALES == SUPER_32 or SCALES == SUPER_16:  # noqa: SIM109 - Triton has no `in`
        size: tl.constexpr = 64 * BITS + 32
        unit: tl.constexpr = HEADER + SUPERBLOCK * size
        at = (group // SUPERBLOCK) * unit + HEADER + (group % SUPERBLOCK) * size
    elif SCALES == SCALE_MIN:
        at = group * (64 * BITS + 64)
    else:
        at = group * (64 * BITS + 32)
    return at


@triton.jit
def scales_at(halves, small, start, group, row, mask, BITS: tl.constexpr, SCALES: tl.constexpr):
    """Return two factors of each group and row: scale and minimum, or the scales of both halves of the group.

    halves, small: the matrix as float16, and as bytes of the kind that scales have in superblocks.
    """
    at = start + block_at(group, BITS, SCALES) + 64 * BITS
    if SCALES == SUPER_32 or SCALES == SUPER_16:  # noqa: SIM109 - Triton has no `in`
        size: tl.constexpr = 64 * BITS + 32
        unit: tl.constexpr = HEADER + SUPERBLOCK * size
        header = (start + (group // SUPERBLOCK) * unit) // 2 + row
        factor = tl.load(halves + header, mask=mask, other=0.0).to(tl.float32)
        first = tl.load(small + at + row, mask=mask, other=0).to(tl.float32) * factor
        second = tl.load(small + at + TILE + row, mask=mask, other=0).to(tl.float32)
        if SCALES == SUPER_32:
            second = -second * tl.load(halves + header + TILE, mask=mask, other=0.0).to(tl.float32)
        else:
            second = second * factor
    else:
        first = tl.load(halves + at // 2 + row, mask=mask, other=0.0).to(tl.float32)
        second = first
        if SCALES == SCALE_MIN:
            second = tl.load(halves + at // 2 + TILE + row, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def code(words, J: tl.constexpr, BITS: tl.constexpr):
    """Return code number J of each word: of two 8-bit, or eight 4-bit codes in the order of their columns."""
    words = words.to(tl.int32)
    if BITS == 8:
        found = (words << (24 - 8 * J)) >> 24  # signed
    else:
        # column 4 b + 2 n + h: nibble n of byte 2 h + b
        shift: tl.constexpr = 8 * (2 * (J % 2) + J // 4) + 4 * ((J // 2) % 2)
        found = (words >> shift) & 15
    return found.to(tl.float32)


@triton.jit
def multiply_tiles(
    x,
    added,
    more,
    sum_out,
    words,
    halves,
    small,
    bias,
    out,
    residual,
    other,
    norm_weight,
    norm_bias,
    added_weight,
    added_bias,
    columns,
    stride,
    second,
    third,
    rows,
    second_rows,
    third_rows,
    eps,
    added_eps,
    added_scale,
    softcap,
    residual_scale,
    MATRICES: tl.constexpr,
    NORM: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_MORE: tl.constexpr,
    ADDED_NORM: tl.constexpr,
    HAS_ADDED_BIAS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute the 16 results of a tile, like `kernels.multiply`; codes become weights in registers.

    words: the matrix as 16-bit words of two 8-bit codes, or 32-bit words of eight 4-bit codes. `stride`, `second` and
    `third` are in bytes. GROUPS groups of 32 columns are read at once.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    is_first_program = block == 0
    block, offset, first_result, count = matrix_of(block, rows, second_rows, third_rows, second, third, MATRICES, TILE)
    start = offset + block.to(tl.int64) * stride

    STATISTICS: tl.constexpr = 1024
    added_mean = 0.0
    added_factor = 0.0
    if ADDED_NORM > 0:
        added_mean, added_factor = moments(added, columns, added_eps, ADDED_NORM, STATISTICS)
    mean = 0.0
    factor = 1.0
    if NORM == LAYER_NORM:
        mean, factor = summed_moments(
            x, added, more, added_weight, added_bias, added_mean, added_factor, added_scale, columns, eps,
            HAS_ADDED, HAS_MORE, ADDED_NORM, HAS_ADDED_BIAS, STATISTICS,
        )  # fmt: skip

    # (groups, words of a group, rows)
    CODES: tl.constexpr = 2 if BITS == 8 else 8
    WORDS: tl.constexpr = GROUP // CODES
    WORD_BYTES: tl.constexpr = 2 if BITS == 8 else 4
    row = tl.arange(0, TILE)
    word = tl.arange(0, WORDS)[None, :]
    products = tl.zeros((GROUPS, WORDS, TILE), tl.float32)
    gates = tl.zeros((GROUPS, WORDS, TILE), tl.float32)
    row_squares = tl.zeros((GROUPS, WORDS), tl.float32)
    groups = columns // GROUP
    for k in range(0, groups, GROUPS):
        group = k + tl.arange(0, GROUPS)
        is_group = group < groups
        inside = (block_at(group, BITS, SCALES) // WORD_BYTES)[:, None, None]
        inside = inside + word[:, :, None] * TILE + row[None, None, :]
        mask = is_group[:, None, None] & (row >= 0)[None, None, :]
        w = tl.load(words + start // WORD_BYTES + inside, mask=mask, other=0)
        scale_mask = is_group[:, None] & (row >= 0)[None, :]
        scale, least = scales_at(halves, small, start, group[:, None], row[None, :], scale_mask, BITS, SCALES)
        v = w
        gate_scale = scale
        gate_least = least
        if GATED:
            v = tl.load(words + (start + second) // WORD_BYTES + inside, mask=mask, other=0)
            gate_scale, gate_least = scales_at(
                halves, small, start + second, group[:, None], row[None, :], scale_mask, BITS, SCALES
            )
        part_products = tl.zeros((GROUPS, WORDS, TILE), tl.float32)
        part_gates = tl.zeros((GROUPS, WORDS, TILE), tl.float32)
        part_sums = tl.zeros((GROUPS, WORDS), tl.float32)
        for j in tl.static_range(CODES):
            c = group[:, None] * GROUP + word * CODES + j
            is_column = is_group[:, None] & (word >= 0)
            part = summed(
                x, added, more, added_weight, added_bias, added_mean, added_factor, added_scale, c, is_column,
                HAS_ADDED, HAS_MORE, ADDED_NORM, HAS_ADDED_BIAS,
            )  # fmt: skip
            if HAS_SUM:
                tl.store(sum_out + c, part, mask=is_column & is_first_program)
            if NORM == RMS_NORM:
                row_squares += part * part
                part = part * tl.load(norm_weight + c, mask=is_column, other=0.0)
            if NORM == LAYER_NORM:
                part = normalized(part, norm_weight, norm_bias, c, is_column, mean, factor, HAS_NORM_BIAS)
            part_products += code(w, j, BITS) * part[:, :, None]
            part_sums += part
            if GATED:
                part_gates += code(v, j, BITS) * part[:, :, None]
        if SCALES == SUPER_16:
            is_low = (word < WORDS // 2)[:, :, None]
            products += part_products * tl.where(is_low, scale[:, None, :], least[:, None, :])
            if GATED:
                gates += part_gates * tl.where(is_low, gate_scale[:, None, :], gate_least[:, None, :])
        else:
            products += part_products * scale[:, None, :]
            if GATED:
                gates += part_gates * gate_scale[:, None, :]
            if SCALES == SCALE_MIN or SCALES == SUPER_32:  # noqa: SIM109
                products += part_sums[:, :, None] * least[:, None, :]
                if GATED:
                    gates += part_sums[:, :, None] * gate_least[:, None, :]
    y = tl.sum(tl.sum(products, 1), 0)
    z = tl.sum(tl.sum(gates, 1), 0)
    if NORM == RMS_NORM:
        factor = 1.0 / tl.sqrt(tl.sum(tl.sum(row_squares, 1), 0) / columns + eps)
        y = y * factor
        z = z * factor
    result = block * TILE + row
    finish(
        y, z, bias, first_result + result, result < count, rows, softcap, residual, other, residual_scale, out,
        HAS_BIAS, FUNCTION, GATED, RESIDUAL, HAS_OTHER,
    )  # fmt: skip
