"""Decode steps of torch operations: what a model's forward computes for one token, and nothing else.

The residual stream is float32, which saves the norms their conversions; everything else is in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.decode.parts import CPU, Backend, Rotation, head_norm, projection
from streamchat.decode.spec import ACTIVATIONS, BY_HEAD, AttentionSpec, BlockSpec, ModelSpec

Step = Callable[[Tensor, Tensor, Sequence[Any]], Tensor]
"""(1, 1) id, (1, 1) position, the layers of the cache -> (1, 1, vocabulary) logits. Appends to the layers."""
Block = Callable[[Tensor, Rotation, Any], None]
"""(1, hidden) float32, changed in place."""


def decode_step(model: ModelSpec, backend: Backend = CPU) -> Step:
    """Return the step of `model`.

    It takes for each layer what `backend.attend` takes: a `StreamingLayer` on a CPU. `plain.is_plain` must accept the
    model.
    """
    table: Any = model.embedding.weight
    rotary, norm, head = model.rotaries[0], backend.norm(model.norm, model.dtype), projection(model.head)
    blocks = [_block(block, model.dtype, backend) for block in model.blocks]

    def step(ids: Tensor, positions: Tensor, layers: Sequence[Any]) -> Tensor:
        x = functional.embedding(ids.view(-1), table)
        h, rotate = x.float(), Rotation(rotary, x, positions)
        if h is x:  # the table itself was float32
            h = x.clone()
        for block, layer in zip(blocks, layers, strict=True):
            block(h, rotate, layer)
        logits: Tensor = head(norm(h))
        return logits[None]

    return step


def _block(of: BlockSpec, dtype: torch.dtype, backend: Backend) -> Block:
    assert of.input_norm is not None
    assert of.mlp_norm is not None
    attention, up_layers = of.attention, of.mlp.up_proj
    input_norm, post_attention_norm = backend.norm(of.input_norm, dtype), backend.norm(of.mlp_norm, dtype)
    heads = _heads_interleaved(attention) if attention.layout == BY_HEAD else _heads_concatenated(attention, dtype)
    o_proj, down_proj = projection(attention.o_proj), projection(of.mlp.down_proj)
    attend, scale = backend.attend, attention.scale
    up_proj, act, gated = projection(*up_layers), ACTIVATIONS[of.mlp.act], len(up_layers) == 2
    parallel_residual = of.parallel

    def mlp(x: Tensor) -> Tensor:
        if not gated:
            return down_proj(act(up_proj(x)))
        gate, up = up_proj(x).chunk(2, dim=-1)
        return down_proj(act(gate) * up)

    def block(h: Tensor, rotate: Rotation, cache: Any) -> None:
        attended = o_proj(attend(cache, *heads(input_norm(h), rotate), scale))
        if parallel_residual:
            h += attended + mlp(post_attention_norm(h))
        else:
            h += attended
            h += mlp(post_attention_norm(h))

    return block


Heads = Callable[[Tensor, Rotation], tuple[Tensor, Tensor, Tensor]]
"""(1, hidden) -> queries (num_heads, head_dim), keys and values (num_kv_heads, head_dim); queries and keys rotated."""


def _heads_concatenated(of: AttentionSpec, dtype: torch.dtype) -> Heads:
    qkv_proj, head_dim, num_heads = projection(*of.qkv_proj), of.head_dim, of.num_heads
    rotated = num_heads + of.num_kv_heads
    q_norm = None if of.q_norm is None else head_norm(of.q_norm, dtype)
    k_norm = None if of.k_norm is None else head_norm(of.k_norm, dtype)

    def split(x: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv_proj(x).view(-1, head_dim)
        if q_norm is None or k_norm is None:
            qk = rotate(qkv[:rotated])
        else:
            qk = rotate(torch.cat([q_norm(qkv[:num_heads]), k_norm(qkv[num_heads:rotated])]))
        return qk[:num_heads], qk[num_heads:], qkv[rotated:]

    return split


def _heads_interleaved(of: AttentionSpec) -> Heads:
    qkv_proj, head_dim = projection(*of.qkv_proj), of.head_dim

    def split(x: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv_proj(x).view(-1, 3, head_dim)
        rotated = qkv[:, :2, : rotate.width]
        rotated.copy_(rotate(rotated))
        return qkv[:, 0], qkv[:, 1], qkv[:, 2]

    return split
