"""One reader for each kind of block: which norms it has, and what is added to what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from streamchat.decode.families.attention import fused_by_head, read_attention, scale_of
from streamchat.decode.families.mlp import read_mlp
from streamchat.decode.families.modules import first_of, in_pairs, read_norm
from streamchat.decode.spec import AttentionSpec, BlockSpec, ModelSpec, QkvLayout, Rotary, separate

BlockReader = Callable[[Any, AttentionSpec], BlockSpec]


def read_model(model: Any, block: BlockReader, *, interleaved: bool = False, **more: Any) -> ModelSpec:
    """Return the spec of a model whose layers have a `self_attn`.

    Args:
        model: A causal LM of transformers.
        block: Reads one layer.
        interleaved: See `AttentionSpec`.
        more: Members of the spec that the modules do not show.

    Raises:
        UnreadableError: It has a part that a decode step does not compute.
    """
    body = model.model
    rotaries, index_of = _rotaries(model, body.rotary_emb, interleaved)
    blocks = []
    for index, layer in enumerate(body.layers):
        attention = read_attention(
            layer.self_attn,
            rotary=index_of(index) if _has_positions(model, layer.self_attn) else None,
            interleaved=interleaved,
            window=window_of(model, index),
            clip=getattr(model.config, "clip_qkv", None),
        )
        blocks.append(block(layer, attention))
    return ModelSpec(
        embedding=body.embed_tokens,
        rotaries=rotaries,
        blocks=tuple(blocks),
        norm=read_norm(first_of(body, "norm", "final_layernorm"), width=model.config.hidden_size),
        head=model.get_output_embeddings(),
        dtype=model.dtype,
        **more,
    )


def _rotaries(model: Any, rotary: Any, interleaved: bool) -> tuple[tuple[Rotary, ...], Callable[[int], int]]:
    """Return the model's rotaries, and which of them a layer uses: one, or one for each type of layers."""
    types = getattr(model.config, "layer_types", None) or []
    named = [name for name in dict.fromkeys(types) if hasattr(rotary, f"{name}_inv_freq")]
    if not named:
        return (in_pairs(rotary) if interleaved else rotary,), lambda _: 0

    def of_type(name: str) -> Rotary:
        return lambda x, positions: rotary(x, positions, name)

    return tuple(of_type(name) for name in named), lambda index: named.index(types[index])


def _has_positions(model: Any, attention: Any) -> bool:
    """Return whether a layer rotates its queries and keys."""
    if hasattr(attention, "use_rope"):  # SmolLM3
        return bool(attention.use_rope)
    name = type(model).__name__
    if name == "Cohere2ForCausalLM":
        return attention.sliding_window is not None
    if name == "Exaone4ForCausalLM":
        return attention.sliding_window is None or bool(attention.is_sliding)
    return True


def window_of(model: Any, index: int) -> int | None:
    """Return the number of tokens that a token of layer `index` sees, including itself; None for all."""
    types = getattr(model.config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    window = getattr(model.config, "sliding_window", None)
    return None if window is None else int(window)


# --- blocks ----------------------------------------------------------------------------------------------------


def plain_block(layer: Any, attention: AttentionSpec) -> BlockSpec:
    """Norm, attention, norm, MLP (Llama and its relatives); Granite scales what is added."""
    width = int(attention.o_proj.out_features)  # type: ignore[arg-type]
    return BlockSpec(
        read_norm(layer.input_layernorm, width=width),
        attention,
        read_norm(layer.post_attention_layernorm, width=width),
        read_mlp(layer.mlp),
        residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def sandwich_block(layer: Any, attention: AttentionSpec) -> BlockSpec:
    """Norms before and after both parts: Gemma 2 and 3."""
    return BlockSpec(
        read_norm(layer.input_layernorm),
        attention,
        read_norm(layer.pre_feedforward_layernorm),
        read_mlp(layer.mlp),
        attention_out_norm=read_norm(layer.post_attention_layernorm),
        mlp_out_norm=read_norm(layer.post_feedforward_layernorm),
    )


def glm4_block(layer: Any, attention: AttentionSpec) -> BlockSpec:
    """The same with GLM 4's names."""
    return BlockSpec(
        read_norm(layer.input_layernorm),
        attention,
        read_norm(layer.post_attention_layernorm),
        read_mlp(layer.mlp),
        attention_out_norm=read_norm(layer.post_self_attn_layernorm),
        mlp_out_norm=read_norm(layer.post_mlp_layernorm),
    )


def outputs_block(layer: Any, attention: AttentionSpec) -> BlockSpec:
    """Norms after both parts only: OLMo 2 and 3, EXAONE 4."""
    return BlockSpec(
        None,
        attention,
        None,
        read_mlp(layer.mlp),
        attention_out_norm=read_norm(layer.post_attention_layernorm),
        mlp_out_norm=read_norm(layer.post_feedforward_layernorm),
    )


def parallel_block(layer: Any, attention: AttentionSpec) -> BlockSpec:
    """Attention and MLP read the same normalized input: Cohere, Phi, and StableLM if it says so."""
    if not getattr(layer, "use_parallel_residual", True):
        return plain_block(layer, attention)
    return BlockSpec(read_norm(layer.input_layernorm), attention, None, read_mlp(layer.mlp), parallel=True)


# --- models with other names -----------------------------------------------------------------------------------


def gemma(model: Any, block: BlockReader) -> ModelSpec:
    """Gemma scales the embeddings; Gemma 2 limits the logits and scores."""
    scale = float(torch.tensor(model.config.hidden_size**0.5, dtype=model.dtype))
    spec = read_model(model, block, embedding_scale=scale, logit_softcap=_number(model, "final_logit_softcapping"))
    softcap = _number(model, "attn_logit_softcapping")
    return spec if softcap is None else spec.with_attention(softcap=softcap)


def granite(model: Any) -> ModelSpec:
    """Granite scales embeddings, what is added, and logits."""
    config = model.config
    embedding_scale, logit_scale = float(config.embedding_multiplier), 1 / float(config.logits_scaling)
    return read_model(model, plain_block, embedding_scale=embedding_scale, logit_scale=logit_scale)


def cohere(model: Any) -> ModelSpec:
    """Cohere scales the logits."""
    return read_model(model, parallel_block, interleaved=True, logit_scale=float(model.config.logit_scale))


def neox(model: Any) -> ModelSpec:
    """GPT-NeoX: Pythia."""
    body = model.gpt_neox
    blocks = []
    for layer in body.layers:
        attention = fused_by_head(layer.attention.query_key_value, layer.attention)
        norms = read_norm(layer.input_layernorm), read_norm(layer.post_attention_layernorm)
        blocks.append(
            BlockSpec(norms[0], attention, norms[1], read_mlp(layer.mlp), parallel=layer.use_parallel_residual)
        )
    norm, head = read_norm(body.final_layer_norm), model.get_output_embeddings()
    return ModelSpec(body.embed_in, (body.rotary_emb,), tuple(blocks), norm, head, model.dtype)


def gptj(model: Any) -> ModelSpec:
    """GPT-J."""
    body = model.transformer

    def rotary(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sin, cos = body.rotary_emb(x, positions)  # in this order
        if sin.shape[-1] * 2 == model.config.rotary_dim:
            sin, cos = sin.repeat_interleave(2, -1), cos.repeat_interleave(2, -1)
        return cos, sin

    blocks = []
    for layer in body.h:
        attention = read_attention(layer.attn, interleaved=True)
        blocks.append(BlockSpec(read_norm(layer.ln_1), attention, None, read_mlp(layer.mlp), parallel=True))
    norm, head = read_norm(body.ln_f), model.get_output_embeddings()
    return ModelSpec(body.wte, (rotary,), tuple(blocks), norm, head, model.dtype)


def falcon(model: Any) -> ModelSpec | None:
    """Falcon with rotary positions: 1B (old), 7B (one head of keys), 40B (two norms)."""
    config, body = model.config, model.transformer
    if config.alibi:
        return None
    blocks = []
    for layer in body.h:
        attention, mlp = _falcon_attention(layer.self_attention, config), read_mlp(layer.mlp)
        if hasattr(layer, "ln_attn"):
            norms = read_norm(layer.ln_attn), read_norm(layer.ln_mlp)
            blocks.append(BlockSpec(norms[0], attention, norms[1], mlp, parallel=True))
        elif config.parallel_attn:
            blocks.append(BlockSpec(read_norm(layer.input_layernorm), attention, None, mlp, parallel=True))
        else:
            blocks.append(plain_block(layer, attention))
    norm, head = read_norm(body.ln_f), model.get_output_embeddings()
    return ModelSpec(body.word_embeddings, (body.rotary_emb,), tuple(blocks), norm, head, model.dtype)


def _falcon_attention(attention: Any, config: Any) -> AttentionSpec:
    dim, heads, projection = int(attention.head_dim), int(config.num_attention_heads), attention.query_key_value
    if not config.new_decoder_architecture and not config.multi_query:
        return fused_by_head(projection, attention)
    if config.new_decoder_architecture:
        groups = heads // config.num_kv_heads
        # each key head is cached once for each of its queries
        layout, kv_heads = QkvLayout(groups + 2, groups, groups + 2, groups + 1, groups + 2, groups), heads
    else:
        layout, kv_heads = separate(heads, 1), 1
    return AttentionSpec(
        (projection,), layout, heads, kv_heads, dim, scale_of(attention, dim), first_of(attention, "dense")
    )


def _number(model: Any, name: str) -> float | None:
    found = getattr(model.config, name, None)
    return None if found is None else float(found)
