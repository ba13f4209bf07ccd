"""The Triton kernels of a decode step: embedding, product, attention.

They read everything that changes from token to token from device memory, so that a CUDA graph can repeat them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from streamchat.decode.fused.code_parts import load_codes, load_scales, store_codes, turned
from streamchat.decode.fused.kernel_parts import (
    LAYER_NORM,
    RMS_NORM,
    finish,
    matrix_of,
    moments,
    normalized,
    prepared,
    summed,
    summed_moments,
    tanh,
)


@triton.jit
def embed(ids, table, out, columns, stride, scale, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Write the embedding of the id, times `scale`, as float32."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids).to(tl.int64) * stride
    x = tl.load(table + row + c, mask=c < columns, other=0.0).to(tl.float32)
    tl.store(out + c, x * scale, mask=c < columns)


@triton.jit
def multiply(
    x,
    added,
    more,
    sum_out,
    weight,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute ROWS results: sum, norm, product, bias, activation, gate, residual; see `streamchat.decode.operations`.

    The matrices are (rows, columns), `stride` elements from row to row. The second and third begin `second` and
    `third` elements after the first. With a gate, the second has the same rows, which are multiplied with those of the
    first. The first program writes the sum.

    The next block of weights is requested before the current one is used, and the first one before anything else:
    weights do not depend on the kernel before. With OVERLAP, it may still run then.
    """
    block = tl.program_id(0)
    is_first_program = block == 0
    block, offset, first_result, count = matrix_of(block, rows, second_rows, third_rows, second, third, MATRICES, ROWS)
    row = block * ROWS + tl.arange(0, ROWS)
    is_row = row < count
    column = tl.arange(0, BLOCK)[None, :]
    data = weight + offset + row.to(tl.int64)[:, None] * stride + column
    first_mask = is_row[:, None] & (column < columns)
    w = tl.load(data, mask=first_mask, other=0.0)
    v = w
    if GATED:
        v = tl.load(data + second, mask=first_mask, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    added_mean = 0.0
    added_factor = 0.0
    if ADDED_NORM > 0:
        added_mean, added_factor = moments(added, columns, added_eps, ADDED_NORM, BLOCK)
    mean = 0.0
    factor = 1.0
    if NORM == LAYER_NORM:
        mean, factor = summed_moments(
            x, added, more, added_weight, added_bias, added_mean, added_factor, added_scale, columns, eps,
            HAS_ADDED, HAS_MORE, ADDED_NORM, HAS_ADDED_BIAS, BLOCK,
        )  # fmt: skip

    products = tl.zeros((ROWS, BLOCK), tl.float32)
    gates = tl.zeros((ROWS, BLOCK), tl.float32)
    row_squares = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, columns, BLOCK):
        next_mask = is_row[:, None] & (k + BLOCK + column < columns)
        data += BLOCK
        next_w = tl.load(data, mask=next_mask, other=0.0)
        next_v = next_w
        if GATED:
            next_v = tl.load(data + second, mask=next_mask, other=0.0)
        c = k + tl.arange(0, BLOCK)
        is_column = c < columns
        part = summed(
            x, added, more, added_weight, added_bias, added_mean, added_factor, added_scale, c, is_column,
            HAS_ADDED, HAS_MORE, ADDED_NORM, HAS_ADDED_BIAS,
        )  # fmt: skip
        if HAS_SUM:
            tl.store(sum_out + c, part, mask=is_column & is_first_program)
        if NORM == RMS_NORM:
            # the factor of the whole row comes last: one pass over the input, and none before the weights
            row_squares += part * part
            part = part * tl.load(norm_weight + c, mask=is_column, other=0.0)
        if NORM == LAYER_NORM:
            part = normalized(part, norm_weight, norm_bias, c, is_column, mean, factor, HAS_NORM_BIAS)
        products += w.to(tl.float32) * part[None, :]
        if GATED:
            gates += v.to(tl.float32) * part[None, :]
        w = next_w
        v = next_v
    if NORM == RMS_NORM:
        factor = 1.0 / tl.sqrt(tl.sum(row_squares, 0) / columns + eps)
    y = tl.sum(products, 1)
    z = tl.sum(gates, 1)
    if NORM == RMS_NORM:
        y = y * factor
        z = z * factor
    finish(
        y, z, bias, first_result + row, is_row, rows, softcap, residual, other, residual_scale, out,
        HAS_BIAS, FUNCTION, GATED, RESIDUAL, HAS_OTHER,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "slots"])  # one kernel for caches of any size
def attend(
    qkv,
    keys,
    values,
    key_scales,
    value_scales,
    cos,
    sin,
    query_weight,
    query_bias,
    key_weight,
    key_bias,
    first_slot,
    new_slot,
    partial,
    arrivals,
    out,
    head_stride,
    value_head_stride,
    slots,
    num_heads,
    num_kv_heads,
    query_stride,
    key_start,
    key_stride,
    value_start,
    value_stride,
    query_norm_stride,
    key_norm_stride,
    window,
    scale,
    softcap,
    clip,
    query_eps,
    key_eps,
    splits,
    COPIES: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    HAS_QUERY_BIAS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    TURN: tl.constexpr,
    OPERAND: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Attention of one new token for the queries of one key head, over one part of the live slots.

    Program (head, 0) also appends the new key and value, and attends to them from registers: no other program reads
    the new slot. The program that is done last joins the parts of its head. The live slots are divided among as many
    of the `splits` programs as have at least LEAST blocks of BLOCK slots to read; the others do nothing.

    With KEY_BITS and VALUE_BITS of 8 or 4 instead of 0, keys and values are codes, with a scale for each of the `slots`
    of a head. Their heads are turned: multiplied by Hadamard matrices of TURN columns. So are the queries, which does
    not change the scores, and so is the result. The scales of values are factors on the shares, which are rounded to
    SHARES then: bfloat16, as a float16 might overflow or vanish.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, split = tl.program_id(0), tl.program_id(1)
    new = tl.load(new_slot).to(tl.int32)
    low = tl.load(first_slot).to(tl.int32)
    if HAS_WINDOW:
        low = tl.maximum(low, new - window + 1)
    length = new - low
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, splits), BLOCK), LEAST) * BLOCK
    active = tl.maximum(tl.cdiv(length, chunk), 1)
    if split >= active:
        return

    place, copy = head // COPIES, head % COPIES
    group = tl.arange(0, PADDED_GROUP)[:, None]
    is_query = group < GROUP
    query_head = head * GROUP + group
    q = prepared(
        qkv, place * query_stride + (copy * GROUP + group) * DIM, is_query, query_weight, query_bias,
        query_head * query_norm_stride, qkv, num_heads * DIM, query_eps, clip, cos, sin,
        QUERY_NORM, HAS_QUERY_BIAS, IS_WHOLE, HAS_CLIP, ROTARY, INTERLEAVED, DIM, PADDED_DIM,
    )  # fmt: skip
    d = tl.arange(0, PADDED_DIM)[None, :]
    is_dim = d < DIM
    k_new = tl.zeros((1, PADDED_DIM), tl.float32)
    v_new = k_new
    if split == 0:
        one = tl.arange(0, 1)[:, None]
        k_new = prepared(
            qkv, key_start + place * key_stride + one, one == 0, key_weight, key_bias,
            head * key_norm_stride + one, qkv + key_start, num_kv_heads * DIM, key_eps, clip, cos, sin,
            KEY_NORM, HAS_KEY_BIAS, IS_WHOLE, HAS_CLIP, ROTARY, INTERLEAVED, DIM, PADDED_DIM,
        )  # fmt: skip
        v_new = tl.load(qkv + value_start + place * value_stride + d, mask=is_dim, other=0.0)
        if HAS_CLIP:
            v_new = tl.minimum(tl.maximum(v_new, -clip), clip)

    keys += head.to(tl.int64) * head_stride
    values += head.to(tl.int64) * value_head_stride
    if KEY_BITS > 0:
        # the scale of scores, usually the root of 1 / DIM, makes up for what turning may add to a number
        q = tl.where(group == GROUP, k_new, tl.where(group == GROUP + 1, v_new, q * scale))
        q = turned(q, TURN, PADDED_GROUP, PADDED_DIM)
        k_new = tl.sum(tl.where(group == GROUP, q, 0.0), 0)[None, :]
        v_new = tl.sum(tl.where(group == GROUP + 1, q, 0.0), 0)[None, :]
        q = tl.where(is_query, q, 0.0).to(OPERAND)
        key_scales += head.to(tl.int64) * slots
        value_scales += head.to(tl.int64) * slots
    else:
        q = q.to(keys.dtype.element_ty)

    best = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    result = tl.zeros((PADDED_GROUP, PADDED_DIM), tl.float32)
    if split == 0:
        new_at = new.to(tl.int64)
        if KEY_BITS > 0:
            key = store_codes(keys, key_scales, new_at, k_new, KEY_BITS, DIM, PADDED_DIM)
            value = store_codes(values, value_scales, new_at, v_new, VALUE_BITS, DIM, PADDED_DIM)
            score = tl.sum(q.to(tl.float32) * key, 1)
        else:
            key = k_new.to(keys.dtype.element_ty)
            value = v_new.to(values.dtype.element_ty)
            at = new_at * DIM + d
            tl.store(keys + at, key, mask=is_dim)
            tl.store(values + at, value, mask=is_dim)
            score = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
        if HAS_SOFTCAP:
            score = softcap * tanh(score / softcap)
        best = score
        total += 1.0
        result += value.to(tl.float32)

    q = q.to(OPERAND)
    begin = low + split * chunk
    end = tl.minimum(begin + chunk, new)
    for n in tl.range(begin, end, BLOCK, num_stages=STAGES):
        slot = n + tl.arange(0, BLOCK)
        is_slot = slot < end
        if KEY_BITS > 0:
            k = load_codes(keys, slot, is_slot, KEY_BITS, DIM, PADDED_DIM).to(OPERAND)
            v = load_codes(values, slot, is_slot, VALUE_BITS, DIM, PADDED_DIM).to(SHARES)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * load_scales(key_scales, slot, is_slot)[None, :]
        else:
            at = slot.to(tl.int64)[:, None] * DIM + d
            mask = is_slot[:, None] & is_dim
            k = tl.load(keys + at, mask=mask, other=0.0).to(OPERAND)
            v = tl.load(values + at, mask=mask, other=0.0).to(OPERAND)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(is_slot[None, :], scores, float("-inf"))
        larger = tl.maximum(best, tl.max(scores, 1))
        fade = tl.exp(best - larger)
        shares = tl.exp(scores - larger[:, None])
        total = total * fade + tl.sum(shares, 1)
        if KEY_BITS > 0:
            shares = (shares * load_scales(value_scales, slot, is_slot)[None, :]).to(SHARES)
        else:
            shares = shares.to(values.dtype.element_ty).to(OPERAND)
        result = result * fade[:, None] + tl.dot(shares, v, input_precision="ieee")
        best = larger

    row = tl.arange(0, PADDED_GROUP)
    cells = row[:, None] * PADDED_DIM + d
    result_at = out + head * (GROUP * DIM) + row[:, None] * DIM + d
    result_mask = (row < GROUP)[:, None] & is_dim
    if active == 1:
        attended = result / total[:, None]
        if KEY_BITS > 0:
            attended = turned(attended, TURN, PADDED_GROUP, PADDED_DIM)
        tl.store(result_at, attended.to(out.dtype.element_ty), mask=result_mask)
        return
    # (head, split): results, then the largest score and the sum of each query
    size: tl.constexpr = PADDED_GROUP * (PADDED_DIM + 2)
    mine = partial + (head * splits + split) * size
    tl.store(mine + cells, result, mask=result_mask)
    tl.store(mine + PADDED_GROUP * PADDED_DIM + row, best, mask=row < GROUP)
    tl.store(mine + PADDED_GROUP * (PADDED_DIM + 1) + row, total, mask=row < GROUP)
    tl.debug_barrier()  # the parts of all threads come before the arrival
    arrived = tl.atomic_add(arrivals + head, 1, sem="acq_rel", scope="gpu")
    if arrived != active - 1:
        return
    best = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    result = tl.zeros((PADDED_GROUP, PADDED_DIM), tl.float32)
    for i in range(active):
        part = partial + (head * splits + i) * size
        # .cg: from the second-level cache, which all programs share
        larger_part = tl.load(part + PADDED_GROUP * PADDED_DIM + row, mask=row < GROUP, other=0.0, cache_modifier=".cg")
        total_part = tl.load(
            part + PADDED_GROUP * (PADDED_DIM + 1) + row, mask=row < GROUP, other=1.0, cache_modifier=".cg"
        )
        result_part = tl.load(part + cells, mask=result_mask, other=0.0, cache_modifier=".cg")
        larger = tl.maximum(best, larger_part)
        fade, grow = tl.exp(best - larger), tl.exp(larger_part - larger)
        total = total * fade + total_part * grow
        result = result * fade[:, None] + result_part * grow[:, None]
        best = larger
    attended = result / total[:, None]
    if KEY_BITS > 0:
        attended = turned(attended, TURN, PADDED_GROUP, PADDED_DIM)
    tl.store(result_at, attended.to(out.dtype.element_ty), mask=result_mask)
    tl.store(arrivals + head, 0)
