"""Decode steps made from a model's own modules: what its forward computes for one token, and nothing else.

The residual stream is float32, which saves the norms their conversions; all else is in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.speed.parts import CPU, Kit, Rotation, activation, layer_norm, projection

Step = Callable[[Tensor, Tensor, Sequence[Any]], Tensor]
"""(1, 1) id, (1, 1) position, the layers of the cache -> (1, 1, vocabulary) logits. Appends to the layers."""
Block = Callable[[Tensor, Rotation, Any], None]
"""(1, hidden) float32, changed in place."""


def decode_step(model: Any, kit: Kit = CPU) -> Step | None:
    """The step of `model` (a causal LM of transformers, in eval mode); None for a family that is not known here.

    Known are the classes themselves, not what looks or calls itself alike. What the step is given for each layer is
    what the attention of `kit` takes: `StreamingLayer` on a CPU.
    """
    make = _FAMILIES.get(type(model).__name__)
    known = make is not None and type(model).__module__.startswith("transformers.models.")
    return make(model, kit) if known and make is not None and _is_plain(model.config) else None


def _is_plain(config: Any) -> bool:
    """Every layer attends to all that the cache holds, with the attention that is made anew here."""
    kinds = getattr(config, "layer_types", None) or ()
    sliding = getattr(config, "sliding_window", None) is not None and not kinds
    return config._attn_implementation == "sdpa" and not sliding and all(kind == "full_attention" for kind in kinds)


def _step(embedding: Any, rotary: Any, blocks: list[Block], norm: Any, head: Any) -> Step:
    weight = embedding.weight

    def step(ids: Tensor, positions: Tensor, layers: Sequence[Any]) -> Tensor:
        x = functional.embedding(ids.view(-1), weight)
        h, rotate = x.float(), Rotation(rotary, x, positions)
        if h is x:  # the table itself was float32
            h = x.clone()
        for block, layer in zip(blocks, layers, strict=True):
            block(h, rotate, layer)
        logits: Tensor = head(norm(h))
        return logits[None]

    return step


def _llama(model: Any, kit: Kit) -> Step:
    """Llama and its kin: Mistral, Qwen2 (biases), Qwen3 (norms of queries and keys)."""
    body, dtype = model.model, model.dtype
    blocks = [_llama_block(layer, dtype, kit) for layer in body.layers]
    head = projection(model.get_output_embeddings())
    return _step(body.embed_tokens, body.rotary_emb, blocks, kit.rms_norm(body.norm, dtype), head)


def _llama_block(layer: Any, dtype: torch.dtype, kit: Kit) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    read = projection(attention.q_proj, attention.k_proj, attention.v_proj)
    write = projection(attention.o_proj)
    widen, narrow = projection(mlp.gate_proj, mlp.up_proj), projection(mlp.down_proj)
    before, between = (kit.rms_norm(norm, dtype) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    act, scale, dim, attend = activation(mlp.act_fn), attention.scaling, attention.head_dim, kit.attend
    heads = attention.q_proj.out_features // dim
    kv_heads = attention.k_proj.out_features // dim
    turned = heads + kv_heads
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)

    def block(h: Tensor, rotate: Rotation, cache: Any) -> None:
        qkv = read(before(h)).view(-1, dim)
        if q_norm is None or k_norm is None:
            qk = rotate(qkv[:turned])
        else:
            qk = rotate(torch.cat([q_norm(qkv[:heads]), k_norm(qkv[heads:turned])]))
        h += write(attend(cache, qk[:heads], qk[heads:], qkv[turned:], scale))
        gate, up = widen(between(h)).chunk(2, dim=-1)
        h += narrow(act(gate) * up)

    return block


def _neox(model: Any, kit: Kit) -> Step:
    """GPT-NeoX: Pythia."""
    body, dtype = model.gpt_neox, model.dtype
    blocks = [_neox_block(layer, dtype, kit) for layer in body.layers]
    head = projection(model.get_output_embeddings())
    return _step(body.embed_in, body.rotary_emb, blocks, layer_norm(body.final_layer_norm, dtype), head)


def _neox_block(layer: Any, dtype: torch.dtype, kit: Kit) -> Block:
    attention, mlp = layer.attention, layer.mlp
    read, write = projection(attention.query_key_value), projection(attention.dense)
    widen, narrow = projection(mlp.dense_h_to_4h), projection(mlp.dense_4h_to_h)
    before, between = layer_norm(layer.input_layernorm, dtype), layer_norm(layer.post_attention_layernorm, dtype)
    act, scale, dim, attend = activation(mlp.act), attention.scaling, attention.head_size, kit.attend
    parallel = layer.use_parallel_residual

    def block(h: Tensor, rotate: Rotation, cache: Any) -> None:
        qkv = read(before(h)).view(-1, 3, dim)  # by head, then query, key, value
        turned = qkv[:, :2, : rotate.width]
        turned.copy_(rotate(turned))
        attended = write(attend(cache, qkv[:, 0], qkv[:, 1], qkv[:, 2], scale))
        if parallel:
            h += attended + narrow(act(widen(between(h))))
        else:
            h += attended
            h += narrow(act(widen(between(h))))

    return block


_FAMILIES: dict[str, Callable[[Any, Kit], Step]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
    "GPTNeoXForCausalLM": _neox,
}
