"""Decode steps of torch operations: what a model's forward pass computes for one token, and nothing else.

With a backend for several tokens, the same operations compute a short prompt, a row per token.

The residual stream is float32, which saves the norms their conversions; everything else is in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.decode.parts import CPU, Backend, Op, Rotation, head_norm, projection
from streamchat.decode.spec import (
    ACTIVATIONS,
    BY_HEAD,
    AttentionSpec,
    BlockSpec,
    ExpertsSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
)

Step = Callable[[Tensor, Tensor, Sequence[Any]], Tensor]
"""(1, 1) id, (1, 1) position, the layers of the cache -> (1, 1, vocabulary) logits. Appends to the layers."""
Block = Callable[[Tensor, Rotation | None, Any], None]
"""(1, hidden) float32, changed in place."""


def decode_step(model: ModelSpec, backend: Backend = CPU) -> Step:
    """Return the step of `model`.

    It takes for each layer what `backend.attend` takes: a `StreamingLayer` on a CPU.
    """
    table: Any = model.embedding.weight
    norm, head = backend.norm(model.norm, model.dtype), _output(model)
    blocks = [_block(block, model.dtype, backend) for block in model.blocks]
    kinds = [(block.attention.rotary, block.attention.interleaved) for block in model.blocks]
    needed = [kind for kind in dict.fromkeys(kinds) if kind[0] is not None]
    embedding_scale, several = model.embedding_scale, backend.several

    def step(ids: Tensor, positions: Tensor, layers: Sequence[Any]) -> Tensor:
        x = functional.embedding(ids.view(-1), table)
        if embedding_scale != 1:
            x = x * embedding_scale
        h = x.float()
        rotations: dict[tuple[int | None, bool], Any] = {
            (index, pairs): Rotation(model.rotaries[index], x, positions, pairs, several)
            for index, pairs in needed
            if index is not None
        }
        if h is x:  # the table itself was float32
            h = x.clone()
        for block, kind, layer in zip(blocks, kinds, layers, strict=True):
            block(h, rotations.get(kind), layer)
        if several:
            h = h.index_select(0, layers[-1].last)
        return head(norm(h))[None]

    return step


def _output(model: ModelSpec) -> Op:
    """(1, hidden) -> (1, vocabulary) logits."""
    head, scale, cap = projection(model.head), model.logit_scale, model.logit_softcap
    if scale == 1 and cap is None:
        return head
    if cap is None:
        return lambda x: head(x) * scale
    return lambda x: torch.tanh(head(x) * (scale / cap)) * cap


def _block(of: BlockSpec, dtype: torch.dtype, backend: Backend) -> Block:
    attention = of.attention
    attention_input = _input(of.input_norm, dtype, backend)
    mlp_input = None if of.parallel and of.mlp_norm is None else _input(of.mlp_norm, dtype, backend)
    several = backend.several
    neox = _is_neox(attention)
    heads = _heads_interleaved(attention, several) if neox else _heads_anywhere(attention, dtype, several)
    attend, scale = backend.attention(attention), attention.scale
    attention_output = _residual(projection(attention.o_proj), of.attention_out_norm, of.residual_scale, backend)
    mlp = _residual(_mlp_or_experts(of.mlp, backend), of.mlp_out_norm, of.residual_scale, backend)

    def parallel_block(h: Tensor, rotate: Rotation | None, cache: Any) -> None:
        x = attention_input(h)
        attended = attention_output(attend(cache, *heads(x, rotate), scale))
        h += attended + mlp(x if mlp_input is None else mlp_input(h))

    def block(h: Tensor, rotate: Rotation | None, cache: Any) -> None:
        h += attention_output(attend(cache, *heads(attention_input(h), rotate), scale))
        h += mlp(h if mlp_input is None else mlp_input(h))

    return parallel_block if of.parallel else block


def _input(norm: NormSpec | None, dtype: torch.dtype, backend: Backend) -> Op:
    return backend.norm(norm, dtype) if norm is not None else lambda h: h.to(dtype)


def _residual(output: Op, norm: NormSpec | None, scale: float, backend: Backend) -> Op:
    """Return `output` followed by its norm and factor; the result is added to the residual stream."""
    normed = output
    if norm is not None:
        apply = backend.norm(norm, torch.float32)
        normed = lambda x: apply(output(x).float())  # noqa: E731
    return normed if scale == 1 else lambda x: normed(x) * scale


def _mlp_or_experts(of: MlpSpec | ExpertsSpec, backend: Backend) -> Op:
    if isinstance(of, MlpSpec):
        return _mlp(of)
    routed = backend.experts(of)
    if of.shared is None:
        return routed
    shared = _mlp(of.shared)
    if of.shared_gate is None:
        return lambda x: routed(x) + shared(x)
    gate = projection(of.shared_gate)
    return lambda x: torch.addcmul(routed(x), shared(x), torch.sigmoid(gate(x)))


def _mlp(of: MlpSpec) -> Op:
    up_proj, act, down_proj = projection(*of.up_proj), ACTIVATIONS[of.act], projection(of.down_proj)
    if not (of.fused or len(of.up_proj) == 2):
        return lambda x: down_proj(act(up_proj(x)))

    def gated(x: Tensor) -> Tensor:
        gate, up = up_proj(x).chunk(2, dim=-1)
        return down_proj(act(gate) * up)

    return gated


Heads = Callable[[Tensor, Rotation | None], tuple[Tensor, Tensor, Tensor]]
"""(1, hidden) -> queries (num_heads, head_dim), keys and values (num_kv_heads, head_dim); queries and keys rotated.
For several tokens (tokens, hidden) -> (tokens, num_heads, head_dim) and so on."""


def _is_neox(of: AttentionSpec) -> bool:
    plain = of.q_norm is None and of.k_norm is None and of.clip is None
    return plain and not of.interleaved and of.rotary is not None and of.layout == BY_HEAD


def _heads_anywhere(of: AttentionSpec, dtype: torch.dtype, several: bool) -> Heads:
    qkv_proj, head_dim, num_heads, clip = projection(*of.qkv_proj), of.head_dim, of.num_heads, of.clip
    rotated, rows = num_heads + of.num_kv_heads, _row_shape(several)
    order = _head_order(of)
    q_norm = None if of.q_norm is None else head_norm(of.q_norm, dtype)
    k_norm = None if of.k_norm is None else head_norm(of.k_norm, dtype)

    def split(x: Tensor, rotate: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv_proj(x).view(*rows(x), -1, head_dim)
        if clip is not None:
            qkv = qkv.clamp(-clip, clip)
        if order is not None:
            qkv = qkv.index_select(-2, order)
        qk = qkv[..., :rotated, :]
        if q_norm is not None or k_norm is not None:
            q, k = qk[..., :num_heads, :], qk[..., num_heads:, :]
            qk = torch.cat([q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)], dim=-2)
        if rotate is not None and rotate.width == head_dim:
            qk = rotate(qk)
        elif rotate is not None:
            qk = torch.cat([rotate(qk[..., : rotate.width]), qk[..., rotate.width :]], dim=-1)
        return qk[..., :num_heads, :], qk[..., num_heads:, :], qkv[..., rotated:, :]

    return split


def _head_order(of: AttentionSpec) -> Tensor | None:
    """Return the indices of the query, key and value heads in `qkv_proj`'s output; None if they are in that order."""
    layout, size = of.layout, of.num_heads // of.num_kv_heads
    places = [divmod(head, layout.copies) for head in range(of.num_kv_heads)]
    rows = [group * layout.query_group_stride + copy * size + i for group, copy in places for i in range(size)]
    rows += [layout.key_start + group * layout.key_stride for group, _ in places]
    rows += [layout.value_start + group * layout.value_stride for group, _ in places]
    # an adapter in the place of a layer has parameters, but no weight of its own
    device = next(of.o_proj.parameters()).device
    return None if rows == list(range(len(rows))) else torch.tensor(rows, device=device)


def _heads_interleaved(of: AttentionSpec, several: bool) -> Heads:
    qkv_proj, head_dim, rows = projection(*of.qkv_proj), of.head_dim, _row_shape(several)

    def split(x: Tensor, rotate: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        assert rotate is not None
        qkv = qkv_proj(x).view(*rows(x), -1, 3, head_dim)
        rotated = qkv[..., :2, : rotate.width]
        rotated.copy_(rotate(rotated))
        return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]

    return split


def _row_shape(several: bool) -> Callable[[Tensor], tuple[int, ...]]:
    """Return what gives the dimension of the tokens of (tokens, hidden); none for one token."""
    return (lambda x: (x.shape[0],)) if several else (lambda x: ())
