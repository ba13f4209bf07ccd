"""Random attention: layouts of queries and keys, norms, rotations, windows, and formats of the cache."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamchat.kernels.operations import MAX_HEAD_DIM, SOFTCAP, Attention, attend
from tools.kernel_programs import bounded
from tools.kernel_programs.bounded import EPS, Bounded
from tools.kernel_programs.caches import CACHES, Cache, Pair
from tools.kernel_programs.products import RandomNorm
from tools.kernel_programs.program import Program
from tools.kernel_programs.rows import Choices, Rows

Array = NDArray[Any]
LOWEST = 1e29
"""Scores must be smaller than this; the kernels start with a maximum of -1e30."""
MOST_DOUBT = 1e6
"""Relative error of a share above which any result is accepted."""


@dataclass(frozen=True)
class Heads:
    """The sizes and options of an attention."""

    tokens: int
    cached: int
    real: int
    """Number of key heads in the input, each of which is cached `copies` times."""
    copies: int
    groups: int
    dim: int
    rotary: int
    kind: int
    is_interleaved: bool
    window: int
    softcap: float
    clip: float
    norms: str
    """`none`, `shared` (by all heads), `own` (weights for each head), or `whole` (one norm of the whole token)."""
    by_group: bool
    """Whether the key and the value of a group of queries follow these queries."""
    spans: int

    @property
    def kv_heads(self) -> int:
        return self.real * self.copies

    @property
    def caches(self) -> Pair:
        return CACHES[self.kind]


def random_heads(program: Program) -> Heads:
    """Return sizes and options."""
    draw = program.draw
    dim = draw.size(16, 64, 64, 128, MAX_HEAD_DIM, most=48)
    tokens = 0 if draw.chance(0.01) else draw.size(1, 1, 1, 3, 4, 5, 70, most=12)
    copies = draw.choose.choice((1, 1, 1, 2, 3))
    norms = draw.choose.choice(("none", "none", "shared", "own", *(() if copies > 1 else ("whole",))))
    return Heads(
        tokens,
        cached=draw.choose.choice((0, 1, 63, 64, 130, draw.choose.randint(0, 90))),
        real=draw.size(1, 2, most=3),
        copies=copies,
        groups=draw.size(1, 3, 1, 16, 17, 33, 65, most=6) if dim < 100 else draw.size(1, 3),
        dim=dim,
        rotary=2 * draw.choose.choice((0, dim // 2, draw.choose.randint(0, dim // 2))),
        kind=draw.choose.choice([kind for kind, cache in CACHES.items() if dim % cache.unit == 0]),
        is_interleaved=draw.chance(0.3),
        window=draw.choose.choice((0, 0, 1, 5, 64, 200)),
        softcap=draw.choose.choice((0.0, 0.0, 2.0, 50.0)),
        clip=0.0 if norms == "whole" else draw.choose.choice((0.0, 0.0, 0.5, 8.0)),
        norms=norms,
        by_group=norms != "whole" and draw.chance(0.4),
        spans=draw.size(1, 1, 2, 9, most=4),
    )


def append_attention(program: Program) -> tuple[int, Bounded]:
    """Append random attention; return its address, and the combined result (tokens, heads * dim)."""
    draw, memory, h = program.draw, program.memory, random_heads(program)
    row, parts, strides = _qkv(program, h)
    at = memory.give(row)
    assert at is not None
    norms = [_head_norm(program, h, heads) for heads in (h.kv_heads * h.groups, h.kv_heads)]
    cos, sin = draw.plain(h.tokens, h.rotary), draw.plain(h.tokens, h.rotary)
    slots, first = h.cached + h.tokens + draw.choose.choice((0, 2)), draw.choose.choice((0, 0, 3))
    caches = (h.caches.keys, h.caches.values)
    before = [cache.encode(draw.numbers(h.kv_heads, first + slots, h.dim)) for cache in caches]
    shared = [each.share(memory) for each in before]
    scale = float(np.float32(draw.choose.choice((0.7, 0.7, 3.0)) / math.sqrt(h.dim)))
    partial, _ = memory.receive(h.tokens * h.kv_heads * h.spans * h.groups * (h.dim + 2))
    memory.regions[-1].flags = 0  # not looked at
    attention = Attention(
        *(at + 4 * offset for offset in parts.offsets),
        memory.give(cos),
        memory.give(sin),
        **before[0].members("key", shared[0], first),
        **before[1].members("value", shared[1], first),
        partial=partial,
        **{name: each.place(program) for name, each in zip(("query_norm", "key_norm"), norms, strict=True) if each},
        **dict(zip(("query_stride", "key_stride", "value_stride"), strides, strict=True)),
        token_stride=row.shape[1] if h.tokens else 0,
        norm_stride=0 if h.norms == "shared" else h.dim,
        cached=h.cached,
        tokens=h.tokens,
        rotary_dim=h.rotary,
        num_kv_heads=h.kv_heads,
        num_kv_groups=h.groups,
        head_dim=h.dim,
        format=h.kind,
        spans=h.spans,
        window=h.window,
        is_interleaved=h.is_interleaved,
        norms_whole=h.norms == "whole",
        repeats=h.copies - 1,
        scale=scale,
        softcap=h.softcap,
        clip=h.clip,
    )
    address = memory.structure(attention)
    for operation in attend(attention):
        operation.each.attention = ctypes.cast(address, ctypes.POINTER(Attention))
        program.operations.append(operation)
    query, key = (
        _prepared(h, part, norm, cos, sin) for part, norm in zip((parts.query, parts.key), norms, strict=True)
    )
    query = Bounded(query.value * scale, query.error * scale + 2 * EPS * np.abs(query.value * scale))
    cached = []
    new = (key, _clipped(h, parts.value))
    for what, cache, old, rows, to in zip(("keys", "values"), caches, before, new, shared, strict=True):
        fresh = cache.choices(rows.map(lambda x: x.transpose(1, 0, 2)))
        program.require(f"cached {what} of {h}", _cache_check(h, cache, old, fresh, to, first))
        cached.append(_with_new(h, cache, old, fresh, first))
    return address, attended(h, h.caches.keys.queried(query), *cached)


@dataclass(frozen=True)
class _Parts:
    offsets: tuple[int, int, int]
    """Of queries, keys and values, in floats."""
    query: Bounded
    """(tokens, heads, dim)"""
    key: Bounded
    """(tokens, kv_heads, dim)"""
    value: Bounded


def _qkv(program: Program, h: Heads) -> tuple[Array, _Parts, tuple[int, int, int]]:
    """Return random rows, their parts, and the strides of queries, keys and values."""
    draw, queries, dim = program.draw, h.copies * h.groups, h.dim
    width = h.real * (queries + 2) * dim
    row = draw.numbers(h.tokens, width + draw.choose.choice((0, 0, 5)), scale=draw.choose.choice((1.0, 3.0)))
    used = row[:, :width].reshape(h.tokens, h.real * (queries + 2), dim)
    if h.by_group:
        grouped = used.reshape(h.tokens, h.real, queries + 2, dim)
        query, key, value = grouped[:, :, :queries], grouped[:, :, queries], grouped[:, :, queries + 1]
        offsets, stride = (0, queries * dim, (queries + 1) * dim), (queries + 2) * dim
        strides = (stride, stride, stride)
    else:
        first, second = h.real * queries, h.real * (queries + 1)
        query, key, value = used[:, :first], used[:, first:second], used[:, second:]
        offsets, strides = (0, first * dim, second * dim), (queries * dim, dim, dim)
    heads = [query.reshape(h.tokens, h.real * queries, dim), *(np.repeat(each, h.copies, 1) for each in (key, value))]
    return row, _Parts(offsets, *map(Bounded.of, heads)), strides


def _head_norm(program: Program, h: Heads, heads: int) -> RandomNorm | None:
    """Return a norm of queries or keys, with weights (dim) or (heads, dim)."""
    draw = program.draw
    if h.norms == "none":
        return None
    shape = (h.dim,) if h.norms == "shared" else (heads, h.dim)
    bias = draw.plain(*shape) if draw.chance(0.3) else None
    return RandomNorm(draw.plain(*shape), bias, 1e-5, draw.chance(0.4))


def _clipped(h: Heads, x: Bounded) -> Bounded:
    return Bounded(np.clip(x.value, -h.clip, h.clip), x.error) if h.clip else x


def _prepared(h: Heads, x: Bounded, norm: RandomNorm | None, cos: Array, sin: Array) -> Bounded:
    """Return queries or keys (tokens, heads, dim), limited, normalized and rotated."""
    x = _clipped(h, x)
    if norm and h.norms == "whole":
        bias = None if norm.bias is None else norm.bias.ravel()
        flat = RandomNorm(norm.weight.ravel(), bias, norm.eps, norm.is_layer_norm)
        x = flat.apply(x.reshape(len(x.value), norm.weight.size)).reshape(*x.value.shape)
    elif norm:
        x = norm.apply(x)
    turned, rest = x[..., : h.rotary], x[..., h.rotary :]
    c, s = cos[:, None].astype(float), sin[:, None].astype(float)
    found = bounded.rotate(turned, c, s, h.is_interleaved)
    return Bounded(np.concatenate([found.value, rest.value], -1), np.concatenate([found.error, rest.error], -1))


def _with_new(h: Heads, cache: Cache, old: Rows, fresh: Choices, first: int) -> Bounded:
    """Return the cached rows, (kv_heads, cached + tokens, dim), of which the last ones are new."""
    found, new = Bounded.of(cache.decode(old)), fresh.bounds()
    at = slice(first + h.cached, first + h.cached + h.tokens)
    found.value[:, at], found.error[:, at] = new.value, new.error
    return found[:, first : at.stop]


def _cache_check(h: Heads, cache: Cache, old: Rows, fresh: Choices, to: list[tuple[int, int]], first: int) -> Any:
    def check(found: dict[int, Array]) -> str:
        start, arrays = first + h.cached, [found[number] for _, number in to]
        for now, before in zip(arrays, old.arrays, strict=True):
            for part in (np.s_[:, :start], np.s_[:, start + h.tokens :]):
                if now[part].tobytes() != before[part].tobytes():
                    return "wrote to other slots"
        return fresh.difference(cache.decode(Rows(arrays))[:, start : start + h.tokens])

    return check


def attended(h: Heads, query: Bounded, keys: Bounded, values: Bounded) -> Bounded:
    """Return attention: query (tokens, heads, dim), keys and values (kv_heads, slots, dim); (tokens, heads * dim)."""
    count = h.cached + h.tokens
    q = query.reshape(h.tokens, h.kv_heads, h.groups, h.dim).map(lambda x: x.transpose(1, 0, 2, 3))
    q = q.reshape(h.kv_heads, h.tokens * h.groups, h.dim)
    flipped = np.swapaxes
    size, key_size = np.abs(q.value), flipped(np.abs(keys.value), 1, 2)
    error = (
        q.error @ key_size + (size + q.error) @ flipped(keys.error, 1, 2) + bounded.sum_error(h.dim) * (size @ key_size)
    )
    scores = bounded.bound(q.value @ flipped(keys.value, 1, 2), error)
    if h.softcap:
        scores = bounded.activate(SOFTCAP, scores, h.softcap)
    ages = h.cached + np.arange(h.tokens)[:, None] - np.arange(count)
    seen = ((ages >= 0) & (ages < (h.window or count + 1))).repeat(h.groups, 0)[None]
    risky = (np.where(seen, np.abs(scores.value), 0.0) > LOWEST).any(-1, keepdims=True)
    value = np.where(seen, scores.value, -np.inf)
    top = value.max(-1, keepdims=True, initial=-np.inf)
    shares = np.where(seen, np.exp(value - top), 0.0)
    shares = shares / shares.sum(-1, keepdims=True)
    doubt = np.where(seen, scores.error, 0.0)
    depth = np.where(seen, np.minimum(top - value, 90.0), 0.0)
    relative = np.expm1(np.minimum(doubt + doubt.max(-1, keepdims=True, initial=0.0), 600)) + 2e-5 + 4 * EPS * depth
    is_any = risky | np.isneginf(top) | (relative.max(-1, keepdims=True, initial=0.0) > MOST_DOUBT)
    shares, relative = (np.where(is_any, 0.0, each) for each in (shares, relative))
    found = _weighted(h, shares, relative, seen & ~is_any, values)
    parts = Bounded(found.value, np.where(is_any, np.inf, found.error)).reshape(h.kv_heads, h.tokens, h.groups, h.dim)
    return parts.map(lambda x: x.transpose(1, 0, 2, 3)).reshape(h.tokens, h.kv_heads * h.groups * h.dim)


def _weighted(h: Heads, shares: Array, relative: Array, seen: Array, values: Bounded) -> Bounded:
    """Return the sum of values (kv_heads, slots, dim) with shares (kv_heads, rows, slots) of a relative error."""
    is_odd = ~np.isfinite(values.value)
    plain, size = np.where(is_odd, 0.0, values.value), np.where(is_odd, 0.0, np.abs(values.value))
    value = shares @ plain
    doubtful = shares * relative
    error = doubtful @ size + np.abs(value) * doubtful.sum(-1, keepdims=True) + (shares * (1 + relative)) @ values.error
    error = error + bounded.sum_error(shares.shape[-1]) * (shares @ size) + bounded.FLOOR * size.sum(1, keepdims=True)
    error = error + h.caches.values.share_error(np.minimum(shares * (1 + relative), 1.0), plain)
    visible = np.broadcast_to(seen, shares.shape).astype(float)
    error = np.where(visible @ size > bounded.LARGE, np.inf, error)  # shares are divided by their sum at the end
    odd = is_odd.astype(float)
    shown = visible @ odd > 0
    value = np.where(shown, np.nan, value)  # also if its share vanishes
    return bounded.bound(value, np.where(odd.any(1, keepdims=True) & ~shown, np.inf, error))
