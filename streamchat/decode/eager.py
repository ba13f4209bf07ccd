"""Decode steps of torch operations: what a model's forward computes for one token, and nothing else.

The residual stream is float32, which saves the norms their conversions; all else is in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.decode.parts import CPU, Kit, Rotation, activation, head_norm, projection
from streamchat.decode.spec import BlockOf, ModelOf

Step = Callable[[Tensor, Tensor, Sequence[Any]], Tensor]
"""(1, 1) id, (1, 1) position, the layers of the cache -> (1, 1, vocabulary) logits. Appends to the layers."""
Block = Callable[[Tensor, Rotation, Any], None]
"""(1, hidden) float32, changed in place."""


def decode_step(model: ModelOf, kit: Kit = CPU) -> Step:
    """The step of `model`. What it is given for each layer is what the attention of `kit` takes: `StreamingLayer` on
    a CPU.
    """
    table: Any = model.embedding.weight
    rotary, norm, head = model.rotary, kit.norm(model.norm, model.dtype), projection(model.head)
    blocks = [_block(block, model.dtype, kit) for block in model.blocks]

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


def _block(of: BlockOf, dtype: torch.dtype, kit: Kit) -> Block:
    before, between = kit.norm(of.before, dtype), kit.norm(of.between, dtype)
    heads = _heads_by_head(of) if of.by_head else _heads_side_by_side(of, dtype)
    write, narrow, attend, scale = projection(of.write), projection(of.narrow), kit.attend, of.scale
    widen, act, gated, parallel = projection(*of.widen), activation(of.act), len(of.widen) == 2, of.parallel

    def mlp(x: Tensor) -> Tensor:
        if not gated:
            return narrow(act(widen(x)))
        gate, up = widen(x).chunk(2, dim=-1)
        return narrow(act(gate) * up)

    def block(h: Tensor, rotate: Rotation, cache: Any) -> None:
        attended = write(attend(cache, *heads(before(h), rotate), scale))
        if parallel:
            h += attended + mlp(between(h))
        else:
            h += attended
            h += mlp(between(h))

    return block


Heads = Callable[[Tensor, Rotation], tuple[Tensor, Tensor, Tensor]]
"""(1, hidden) -> (heads, dim), (kv_heads, dim), (kv_heads, dim): queries and keys rotated, values."""


def _heads_side_by_side(of: BlockOf, dtype: torch.dtype) -> Heads:
    read, dim, heads, turned = projection(*of.read), of.dim, of.heads, of.heads + of.kv_heads
    q_norm = None if of.q_norm is None else head_norm(of.q_norm, dtype)
    k_norm = None if of.k_norm is None else head_norm(of.k_norm, dtype)

    def split(x: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        qkv = read(x).view(-1, dim)
        if q_norm is None or k_norm is None:
            qk = rotate(qkv[:turned])
        else:
            qk = rotate(torch.cat([q_norm(qkv[:heads]), k_norm(qkv[heads:turned])]))
        return qk[:heads], qk[heads:], qkv[turned:]

    return split


def _heads_by_head(of: BlockOf) -> Heads:
    read, dim = projection(*of.read), of.dim

    def split(x: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        qkv = read(x).view(-1, 3, dim)
        turned = qkv[:, :2, : rotate.width]
        turned.copy_(rotate(turned))
        return qkv[:, 0], qkv[:, 1], qkv[:, 2]

    return split
