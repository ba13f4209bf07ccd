"""Parts of the Triton kernels: norms, activations, the input and the results of a product, heads.

Everything is computed in float32. Every load and store has a mask; offsets into weights and caches are 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from streamchat.kernels import operations

RMS_NORM = tl.constexpr(1)
LAYER_NORM = tl.constexpr(2)
SILU = tl.constexpr(operations.SILU)
GELU = tl.constexpr(operations.GELU)
GELU_TANH = tl.constexpr(operations.GELU_TANH)
RELU = tl.constexpr(operations.RELU)
RELU2 = tl.constexpr(operations.RELU2)
SOFTCAP = tl.constexpr(operations.SOFTCAP)


@triton.jit
def tanh(x):
    """Hyperbolic tangent; exact to rounding at both ends, where exp overflows or vanishes."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(x, softcap, FUNCTION: tl.constexpr):
    """Apply an activation."""
    if FUNCTION == SILU:
        x = x / (1.0 + tl.exp(-x))
    elif FUNCTION == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == GELU_TANH:
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif FUNCTION == RELU:
        x = tl.maximum(x, 0.0)
    elif FUNCTION == RELU2:
        x = tl.maximum(x, 0.0)
        x = x * x
    elif FUNCTION == SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def normalized(x, weight, bias, at, mask, mean, factor, HAS_BIAS: tl.constexpr):
    """Return (x - mean) * factor * weight + bias, with the weights `at` some offsets; 0 outside of the mask."""
    x = (x - mean) * factor * tl.load(weight + at, mask=mask, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + at, mask=mask, other=0.0)
    return x


@triton.jit
def moments(x, columns, eps, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return mean (0 for RMSNorm) and factor of the norm of a row."""
    total = tl.zeros((BLOCK,), tl.float32)
    if NORM == LAYER_NORM:
        for k in range(0, columns, BLOCK):
            c = k + tl.arange(0, BLOCK)
            total += tl.load(x + c, mask=c < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / columns
    squares = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, columns, BLOCK):
        c = k + tl.arange(0, BLOCK)
        centered = tl.where(c < columns, tl.load(x + c, mask=c < columns, other=0.0).to(tl.float32) - mean, 0.0)
        squares += centered * centered
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 0) / columns + eps)


@triton.jit
def summed(
    x,
    added,
    more,
    weight,
    bias,
    mean,
    factor,
    scale,
    at,
    mask,
    HAS_ADDED: tl.constexpr,
    HAS_MORE: tl.constexpr,
    ADDED_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Return x + scale * (norm(added) + more), float32."""
    total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADDED:
        part = tl.load(added + at, mask=mask, other=0.0)
        if ADDED_NORM > 0:
            part = normalized(part, weight, bias, at, mask, mean, factor, HAS_BIAS)
        if HAS_MORE:
            part += tl.load(more + at, mask=mask, other=0.0)
        total += scale * part
    return total


@triton.jit
def matrix_of(block, first, second, third, second_at, third_at, MATRICES: tl.constexpr, ROWS: tl.constexpr):
    """Return what a program multiplies with: its block of ROWS rows in a matrix, the matrix, and its results.

    first, second, third: the rows of up to three matrices, which are multiplied together. `second_at` and `third_at`:
    where the second and third begin, after the first. Returns the number of the block in its matrix, where the matrix
    begins, its first result, and its rows.
    """
    begin = second_at * 0
    first_result = first * 0
    count = first
    if MATRICES > 1:
        blocks = tl.cdiv(first, ROWS)
        second_blocks = tl.cdiv(second, ROWS)
        in_second = block >= blocks
        begin = tl.where(in_second, second_at, begin)
        first_result = tl.where(in_second, first, first_result)
        count = tl.where(in_second, second, first)
        block = tl.where(in_second, block - blocks, block)
        if MATRICES > 2:
            in_third = in_second & (block >= second_blocks)
            begin = tl.where(in_third, third_at, begin)
            first_result = tl.where(in_third, first + second, first_result)
            count = tl.where(in_third, third, count)
            block = tl.where(in_third, block - second_blocks, block)
    return block, begin, first_result, count


@triton.jit
def summed_moments(
    x,
    added,
    more,
    weight,
    bias,
    added_mean,
    added_factor,
    scale,
    columns,
    eps,
    HAS_ADDED: tl.constexpr,
    HAS_MORE: tl.constexpr,
    ADDED_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return mean and factor of the LayerNorm of the row that `summed` returns."""
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, columns, BLOCK):
        c = k + tl.arange(0, BLOCK)
        total += summed(
            x, added, more, weight, bias, added_mean, added_factor, scale, c, c < columns,
            HAS_ADDED, HAS_MORE, ADDED_NORM, HAS_BIAS,
        )  # fmt: skip
    mean = tl.sum(total, 0) / columns
    squares = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, columns, BLOCK):
        c = k + tl.arange(0, BLOCK)
        part = summed(
            x, added, more, weight, bias, added_mean, added_factor, scale, c, c < columns,
            HAS_ADDED, HAS_MORE, ADDED_NORM, HAS_BIAS,
        )  # fmt: skip
        part = tl.where(c < columns, part - mean, 0.0)
        squares += part * part
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 0) / columns + eps)


@triton.jit
def finish(
    y,
    gated,
    bias,
    row,
    mask,
    second_bias,
    softcap,
    residual,
    other,
    residual_scale,
    out,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_OTHER: tl.constexpr,
):
    """Write the results of a product: bias, activation, gate, residual."""
    if HAS_BIAS:
        y += tl.load(bias + row, mask=mask, other=0.0)
    y = activate(y, softcap, FUNCTION)
    if GATED:
        if HAS_BIAS:
            gated += tl.load(bias + second_bias + row, mask=mask, other=0.0)
        y = y * gated
    if RESIDUAL:
        if HAS_OTHER:
            y += tl.load(other + row, mask=mask, other=0.0)
        y = tl.load(residual + row, mask=mask, other=0.0) + residual_scale * y
    tl.store(out + row, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def head_values(
    qkv,
    at,
    d,
    mask,
    weight,
    bias,
    norm_at,
    mean,
    factor,
    clip,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
):
    """Return elements `d` of the heads that begin `at` some offsets, limited and normalized."""
    x = tl.load(qkv + at + d, mask=mask, other=0.0)
    if HAS_CLIP:
        x = tl.minimum(tl.maximum(x, -clip), clip)
    if NORM > 0:
        x = normalized(x, weight, bias, norm_at + d, mask, mean, factor, HAS_BIAS)
    return x


@triton.jit
def prepared(
    qkv,
    at,
    exists,
    weight,
    bias,
    norm_at,
    whole,
    whole_columns,
    eps,
    clip,
    cos,
    sin,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Return some heads, limited, normalized and rotated: (heads, PADDED_DIM), 0 outside of them.

    at, exists, norm_at: (heads, 1). whole: all heads of the token, for a norm of all together.
    """
    d = tl.arange(0, PADDED_DIM)[None, :]
    mask = exists & (d < DIM)
    mean = tl.zeros_like(at).to(tl.float32)
    factor = mean
    if NORM > 0:
        if IS_WHOLE:
            row_mean, row_factor = moments(whole, whole_columns, eps, NORM, 1024)
            mean += row_mean
            factor += row_factor
        else:
            x = head_values(qkv, at, d, mask, weight, bias, norm_at, mean, factor, clip, 0, False, HAS_CLIP)
            if NORM == LAYER_NORM:
                mean = tl.sum(x, 1)[:, None] / DIM
            centered = tl.where(mask, x - mean, 0.0)
            factor = 1.0 / tl.sqrt(tl.sum(centered * centered, 1)[:, None] / DIM + eps)
    x = head_values(qkv, at, d, mask, weight, bias, norm_at, mean, factor, clip, NORM, HAS_BIAS, HAS_CLIP)
    if ROTARY > 0:
        if INTERLEAVED:
            is_first = d % 2 == 0
            partner = tl.where(is_first, d + 1, d - 1)
        else:
            is_first = d < ROTARY // 2
            partner = tl.where(is_first, d + ROTARY // 2, d - ROTARY // 2)
        is_rotated = d < ROTARY
        partner = tl.where(is_rotated, partner, d)
        y = head_values(qkv, at, partner, mask, weight, bias, norm_at, mean, factor, clip, NORM, HAS_BIAS, HAS_CLIP)
        c = tl.load(cos + d, mask=is_rotated, other=1.0).to(tl.float32)
        s = tl.load(sin + d, mask=is_rotated, other=0.0).to(tl.float32)
        x = x * c + y * tl.where(is_first, -s, s)
    return x
