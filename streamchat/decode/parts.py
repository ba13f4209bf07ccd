"""The operations of a decode step, each for one token and with little Python overhead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.cache.layers.layer import StreamingLayer
from streamchat.decode.experts import Op as Op
from streamchat.decode.experts import experts
from streamchat.decode.spec import AttentionSpec, ExpertsSpec, NormSpec
from streamchat.quantization.linear import joined_bias, quantized_together
from streamchat.quantization.weights import GROUP

Attend = Callable[[Any, Tensor, Tensor, Tensor, float], Tensor]
"""Like `attend` below."""


@dataclass(frozen=True)
class Backend:
    """The operations that differ between CPU and GPU."""

    norm: Callable[[NormSpec, torch.dtype], Op]
    """(1, hidden) float32 -> (1, hidden) of a dtype."""
    attention: Callable[[AttentionSpec], Attend]
    """Return the attention of a block; its first argument is what the step got for the layer."""
    experts: Callable[[ExpertsSpec], Op]
    """(1, hidden) -> (1, hidden): the chosen experts, without what all tokens share."""
    several: bool = False
    """Whether a step computes several tokens: heads have shape (tokens, heads, head_dim) then, and the logits are those
    of the token at index `last` of the last layer, (1,) int64."""


def projection(*layers: Any) -> Op:
    """(1, in) -> (1, sum of out): outputs of `layers`, concatenated; one product if they were quantized together."""
    whole = quantized_together(layers)
    if whole is None:
        return layers[0] if len(layers) == 1 else lambda x: torch.cat([layer(x) for layer in layers], dim=-1)
    data, scales, multiply = whole.data, whole.scales, whole.multiply
    dtype: torch.dtype = layers[0].weight.dtype
    bias = joined_bias(layers, dtype)
    if bias is not None:
        return lambda x: multiply(x) + bias
    if dtype != torch.bfloat16 or whole.tiled or whole.rows != len(data):
        return multiply
    if whole.layout == "int8":
        return lambda x: torch._weight_int8pack_mm(x, data, scales)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, data, GROUP, scales)


def rms_norm(of: NormSpec, dtype: torch.dtype) -> Op:
    """(1, hidden) float32 -> (1, hidden) of `dtype`: three operations instead of eight."""
    weight, eps = of.weight[None], of.eps
    zeros, width = torch.zeros_like(weight), weight.shape[1]

    def norm(h: Tensor) -> Tensor:
        row = h.view(-1)
        scale = 1 / math.sqrt(torch.dot(row, row).item() / width + eps)
        return torch.addcmul(zeros, h, weight, value=scale).to(dtype)

    return norm


def layer_norm(of: NormSpec, dtype: torch.dtype) -> Op:
    """(1, hidden) float32 -> (1, hidden) of `dtype`."""
    return lambda h: functional.layer_norm(h, of.weight.shape, of.weight, of.bias, of.eps).to(dtype)


def norm_of_row(of: NormSpec, dtype: torch.dtype) -> Op:
    """Return `layer_norm` or `rms_norm`, as `of` says."""
    return layer_norm(of, dtype) if of.is_layer_norm else rms_norm(of, dtype)


def head_norm(of: NormSpec, dtype: torch.dtype) -> Op:
    """(..., heads, head_dim) -> the same of `dtype`: the norm of each head, or of all together if `of.whole`."""
    shape, weight, bias, eps = of.weight.shape, of.weight, of.bias, of.eps
    if of.whole:
        together = head_norm(replace(of, whole=False), dtype)
        return lambda x: together(x.flatten(-2)).view(x.shape)
    if not of.is_layer_norm:
        if weight.ndim == 1:
            return lambda x: functional.rms_norm(x.float(), shape, weight, eps).to(dtype)
        return lambda x: (functional.rms_norm(x.float(), shape[-1:], eps=eps) * weight).to(dtype)
    shift = torch.zeros_like(weight) if bias is None else bias
    return lambda x: torch.addcmul(shift, functional.layer_norm(x.float(), shape[-1:], eps=eps), weight).to(dtype)


class Rotation:
    """Rotary angles of one position, for tensors whose last dimension is rotated by halves or in pairs.

    With `several`, those of several positions, for tensors whose first dimension is that of the tokens.
    """

    def __init__(
        self, module: Any, like: Tensor, position_ids: Tensor, interleaved: bool = False, several: bool = False
    ) -> None:
        cos, sin = module(like, position_ids)
        self.width: int = cos.shape[-1]
        half = self.width // 2
        shape = (-1, self.width) if several else (-1,)
        self._half, self._interleaved, self._several = half, interleaved, several
        self._cos, sin = cos.view(shape), sin.view(shape)
        if interleaved:
            pairs = sin.view(-1, 2)
            self._sin = torch.stack([-pairs[:, 0], pairs[:, 1]], dim=1).view(shape)
            return
        # transformers' rotate_half: roll by half and negate the first half
        self._sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width) of the same dtype; some models (OLMo) compute it in float32."""
        cos, sin = self._cos, self._sin
        if self._several:
            shape = (len(cos), *(1,) * (x.dim() - 2), self.width)
            cos, sin = cos.view(shape), sin.view(shape)
        if self._interleaved:
            partners = x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
        else:
            partners = torch.roll(x, self._half, -1)
        return torch.addcmul(x * cos, partners, sin).to(x.dtype)


def attend(layer: StreamingLayer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Append one token to `layer` and attend to all cached tokens.

    Query heads that share a key head are passed as several queries of that head, so keys are not repeated.

    Args:
        layer: The new key and value are appended to it.
        q: (num_heads, head_dim).
        k: (num_kv_heads, head_dim).
        v: (num_kv_heads, head_dim).
        scale: Factor on the scores.

    Returns:
        (1, num_heads * head_dim).
    """
    heads, dim = k.shape
    keys, values = layer.update(k.view(1, heads, 1, dim), v.view(1, heads, 1, dim))
    queries = q.reshape(1, heads, -1, dim)
    count = queries.shape[2]
    # An even number of queries makes the kernel 1.3 times as fast (3 times for one query in bfloat16).
    if count % 2 and (count > 1 or q.dtype == torch.bfloat16):
        queries = functional.pad(queries, (0, 0, 0, 1))
        attended = functional.scaled_dot_product_attention(queries, keys, values, scale=scale)[:, :, :count]
    else:
        attended = functional.scaled_dot_product_attention(queries, keys, values, scale=scale)
    return attended.reshape(1, -1)


def attention(of: AttentionSpec) -> Attend:
    """Return `attend` with the window and the soft cap of `of`."""
    window, cap = of.window, of.softcap
    if window is None and cap is None:
        return attend

    def limited(layer: StreamingLayer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads, dim = k.shape
        keys, values = layer.update(k.view(1, heads, 1, dim), v.view(1, heads, 1, dim))
        if window is not None:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        queries = q.reshape(1, heads, -1, dim)
        if cap is None:
            attended = functional.scaled_dot_product_attention(queries, keys, values, scale=scale)
        else:
            attended = capped_attention(queries, keys, values, scale, cap)
        return attended.reshape(1, -1)

    return limited


def capped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, cap: float, mask: Tensor | None = None
) -> Tensor:
    """Attention whose scores are cap * tanh(score / cap), before `mask` is added."""
    scores = torch.tanh(queries @ keys.transpose(-1, -2) * (scale / cap)) * cap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values


CPU = Backend(norm_of_row, attention, experts)
