"""Compares the kernels' attention with NumPy."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamchat.kernels.check_codes import CachedPair, random_pair, turned
from streamchat.kernels.check_matrices import noise, stored, values
from streamchat.kernels.check_operations import Array, address, compare, identity, normed, run, zeros
from streamchat.kernels.operations import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, K8V4, Attention, Norm, attend


@dataclass(frozen=True)
class _Heads:
    """An attention with two key heads, each with `queries` queries."""

    dim: int = 64
    rotary_dim: int = 64
    kind: int = BFLOAT16
    queries: int = 3
    is_interleaved: bool = False
    """Pairs of neighbors are rotated."""
    window: int = 0
    softcap: float = 0.0
    clip: float = 0.0
    norms: str = "shared"
    """`shared` by all heads, `own` weights for each head, one for the `whole` token, or `none`."""
    by_group: bool = False
    """The key of a group of queries follows them."""
    value_size: float = 1.0
    repeats: int = 0
    """1: both key heads have the same key and value."""


_HEADS = (
    _Heads(kind=BFLOAT16),
    _Heads(rotary_dim=16, kind=FLOAT32, by_group=True),
    _Heads(dim=48, rotary_dim=32, kind=FLOAT16, is_interleaved=True, norms="own", value_size=1e-6),  # subnormal numbers
    _Heads(dim=128, rotary_dim=128, kind=FLOAT32, softcap=2.0, window=70, norms="whole"),
    _Heads(dim=32, rotary_dim=32, repeats=1),
    _Heads(dim=16, rotary_dim=0, kind=FLOAT32, queries=19, window=1, norms="none", clip=0.5),
    _Heads(kind=INT8),
    _Heads(kind=INT8, dim=48, rotary_dim=32, queries=2, window=70, softcap=2.0, clip=1.0, value_size=1e-6),
    _Heads(kind=INT4, dim=128, rotary_dim=128, queries=4),
    _Heads(kind=INT4, dim=80, rotary_dim=16, queries=19, repeats=1),
    _Heads(kind=K8V4),
    _Heads(kind=K8V4, dim=48, rotary_dim=32, queries=2, window=70, softcap=2.0),
)


def check_attention(kernels: Any) -> None:
    heads, cached, spans = 2, 200, 2  # two blocks of keys per span
    # one token, which is stored by the task that reads it; a few one by one; many together
    for case, tokens in itertools.product(_HEADS, (1, 3, 50)):
        queries, dim, slots = case.queries, case.dim, cached + tokens + 2
        rows = noise(tokens, heads * (queries + 2), dim)
        if case.by_group:
            parts = rows[:, :-heads].reshape(tokens, heads, queries + 1, dim)
            query, key = parts[:, :, :queries], parts[:, :, queries]
        else:
            query = rows[:, : heads * queries].reshape(tokens, heads, queries, dim)
            key = rows[:, heads * queries : -heads]
        value = rows[:, -heads:]
        value *= case.value_size
        given = [address(part) for part in (query, key, value)]
        strides = [part.strides[1] // 4 for part in (query, key, value)]
        if case.repeats:
            strides[0] = 0  # there is no other group
            key, value = (np.repeat(part[:, :1], heads, 1) for part in (key, value))
        norms = [_head_norm(case, count) for count in (heads * queries, heads)]
        angles = noise(tokens, case.rotary_dim // 2)
        angles = np.repeat(angles, 2, 1) if case.is_interleaved else np.tile(angles, 2)
        cos, sin = np.cos(angles), np.sin(angles)
        pair = random_pair(case.kind, heads, slots, dim, case.value_size)
        buffers, before = pair.data, pair.numbers().copy()
        scales = (None, None) if pair.scales is None else pair.scales
        partial = zeros(kernels.attention_partial(tokens, heads, queries, dim, spans))
        attention = Attention(
            *given,
            *(address(part) for part in (cos, sin, *buffers, *scales, partial)),
            *(Norm(address(weight), address(bias), 1e-5, bias is not None) for weight, bias in norms),
            *strides,
            token_stride=rows[0].size,
            norm_stride=0 if case.norms == "shared" else dim,
            head_stride_bytes=buffers[0][0].nbytes,
            scale_stride=slots,
            cached=cached,
            tokens=tokens,
            rotary_dim=case.rotary_dim,
            num_kv_heads=heads,
            num_kv_groups=queries,
            head_dim=dim,
            format=case.kind,
            spans=spans,
            window=case.window,
            is_interleaved=case.is_interleaved,
            norms_whole=case.norms == "whole",
            repeats=case.repeats,
            scale=0.7 / math.sqrt(dim),
            softcap=case.softcap,
            clip=case.clip,
        )
        out = zeros(tokens, heads * queries * dim)
        run(kernels, [*attend(attention), identity(out, attention=attention)])
        if case.clip:
            query, key, value = (np.clip(part, -case.clip, case.clip) for part in (query, key, value))
        flat = query.reshape(tokens, heads * queries, dim)
        flat, key = (
            _rotated(_normed_heads(case, part, *norm), cos, sin, case.is_interleaved)
            for part, norm in zip((flat, key), norms, strict=True)
        )
        new = [part.transpose(1, 0, 2) for part in (key, value)]
        all_keys, all_values = _stored_pair(f"attention with {case}", case, pair, before, cached, new)
        expected = _attended(flat.reshape(tokens, heads, queries, dim), all_keys, all_values, attention.scale, case)
        compare(f"attention with {case}", out, expected)


def _stored_pair(what: str, case: _Heads, pair: CachedPair, before: Array, cached: int, new: list[Array]) -> Array:
    """Return keys and values with the new ones as the kernels should have stored them, (2, heads, tokens, dim).

    Codes are those that the kernels stored: a number between two codes may be rounded to either one.
    """
    if pair.scales is None:
        numbers = np.stack([values(stored(part, case.kind)) for part in new])
        return np.concatenate([before[:, :, :cached], numbers], 2)
    after, stop = pair.numbers(), cached + new[0].shape[1]
    error = np.linalg.norm(after[:, :, cached:stop] - np.stack(new), axis=-1, keepdims=True)
    assert (error <= 1.001 * pair.step()[:, :, cached:stop]).all(), f"{what}: new codes are off"
    if case.kind != K8V4:  # its values are clipped on purpose
        most = np.abs(turned(np.stack(new))).max(-1)
        assert (pair.limits()[:, :, cached:stop] >= 0.9999 * most).all(), f"{what}: new numbers are clipped"
    is_old = np.arange(after.shape[2]) < cached
    assert (after == before)[:, :, is_old].all(), f"{what}: old codes were overwritten"
    return after[:, :, :stop]


def _head_norm(case: _Heads, heads: int) -> tuple[Array | None, Array | None]:
    """Return weights and biases of a norm of queries or keys: a LayerNorm if each head has its own."""
    if case.norms == "none":
        return None, None
    if case.norms == "own":
        return noise(heads, case.dim), noise(heads, case.dim)
    return (noise(case.dim) if case.norms == "shared" else noise(heads, case.dim)), None


def _normed_heads(case: _Heads, x: Array, weight: Array | None, bias: Array | None) -> Array:
    """Return (tokens, heads, dim) after the norm of queries or keys."""
    if weight is None:
        return x
    if case.norms != "whole":
        return normed(x, weight, bias)
    return normed(x.reshape(len(x), -1), weight.ravel()).reshape(x.shape)


def _attended(query: Array, keys: Array, values: Array, scale: float, case: _Heads) -> Array:
    """(tokens, heads, queries, dim), of the last tokens; keys and values (heads, all tokens, dim)."""
    scores = scale * np.einsum("thqd,hkd->thqk", query, keys, dtype=float)
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    tokens, count = len(query), keys.shape[1]
    ages = count - tokens + np.arange(tokens)[:, None] - np.arange(count)
    is_hidden = (ages < 0) | (ages >= (case.window or count))
    shares = np.exp(np.where(is_hidden[:, None, None], -np.inf, scores))
    attended: Array = np.einsum("thqk,hkd->thqd", shares / shares.sum(-1, keepdims=True), values)
    return attended


def _rotated(x: Array, cos: Array, sin: Array, is_interleaved: bool) -> Array:
    """Return `x` (tokens, heads, dim) with as many dimensions rotated as `cos` has, in pairs or by halves."""
    part, rest = np.split(x, [cos.shape[1]], -1)
    if is_interleaved:
        partners = np.stack([-part[..., 1::2], part[..., ::2]], -1).reshape(part.shape)
    else:
        low, high = np.split(part, 2, -1)
        partners = np.concatenate([-high, low], -1)
    return np.concatenate([part * cos[:, None] + partners * sin[:, None], rest], -1)
