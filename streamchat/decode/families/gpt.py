"""Families with other names and layouts: GPT-NeoX, Falcon and GPT-J."""

from __future__ import annotations

import functools
from typing import Any

from streamchat.decode.families.errors import UnsupportedPartError
from streamchat.decode.families.norms import norm_spec
from streamchat.decode.families.parts import Place, read_mlp, separate_attention
from streamchat.decode.families.rotaries import Rotaries, read_rotaries, sines_first
from streamchat.decode.spec import BY_HEAD, AttentionSpec, BlockSpec, ModelSpec, NormSpec, QkvLayout, separate


def read_neox(model: Any) -> ModelSpec:
    """Return the description of a GPT-NeoX (Pythia)."""
    body, width = model.gpt_neox, model.config.hidden_size
    rotaries = read_rotaries(model)
    blocks = []
    for layer in body.layers:
        attention = layer.attention
        heads = attention.query_key_value.out_features // (3 * attention.head_size)
        spec = AttentionSpec(
            qkv_proj=(attention.query_key_value,),
            layout=BY_HEAD,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=attention.head_size,
            scale=attention.scaling,
            o_proj=attention.dense,
            interleaved=rotaries.interleaved,
        )
        norms = (norm_spec(each, width) for each in (layer.input_layernorm, layer.post_attention_layernorm))
        blocks.append(
            BlockSpec(next(norms), spec, next(norms), read_mlp(layer.mlp), parallel=layer.use_parallel_residual)
        )
    return _model(model, body.embed_in, rotaries, blocks, body.final_layer_norm)


def read_falcon(model: Any) -> ModelSpec:
    """Return the description of a Falcon with rotary positions, in any of its layouts."""
    body, config = model.transformer, model.config
    if config.alibi:
        raise UnsupportedPartError("biases of positions (ALiBi) are not supported")
    rotaries = read_rotaries(model)
    blocks = []
    for layer in body.h:
        attention = _falcon_attention(layer.self_attention, rotaries.interleaved)
        input_norm, mlp_norm = _falcon_norms(layer, config)
        parallel = config.new_decoder_architecture or config.parallel_attn
        blocks.append(BlockSpec(input_norm, attention, mlp_norm, read_mlp(layer.mlp), parallel=parallel))
    return _model(model, body.word_embeddings, rotaries, blocks, body.ln_f)


def _falcon_attention(attention: Any, interleaved: bool) -> AttentionSpec:
    heads, dim = attention.num_heads, attention.head_dim
    cached = heads
    if attention.new_decoder_architecture:  # the keys are cached once for each query
        group = heads // attention.num_kv_heads
        layout = QkvLayout(group + 2, group, group + 2, group + 1, group + 2, copies=group)
    elif attention.multi_query:
        cached, layout = 1, separate(heads, 1)
    else:
        layout = BY_HEAD
    return AttentionSpec(
        qkv_proj=(attention.query_key_value,),
        layout=layout,
        num_heads=heads,
        num_kv_heads=cached,
        head_dim=dim,
        scale=dim**-0.5,
        o_proj=attention.dense,
        interleaved=interleaved,
    )


def _falcon_norms(layer: Any, config: Any) -> tuple[NormSpec, NormSpec | None]:
    """Return the norms of attention and MLP; None for the MLP if it shares that of the attention."""
    width = config.hidden_size
    if hasattr(layer, "ln_attn"):
        return norm_spec(layer.ln_attn, width), norm_spec(layer.ln_mlp, width)
    second = getattr(layer, "post_attention_layernorm", None)
    return norm_spec(layer.input_layernorm, width), None if second is None else norm_spec(second, width)


def read_gptj(model: Any) -> ModelSpec:
    """Return the description of a GPT-J."""
    body, width = model.transformer, model.config.hidden_size
    table = getattr(body, "rotary_emb", None)
    if table is None or model.config.rotary_dim is None:
        raise UnsupportedPartError("the positions are not in a module of the model")
    rotaries = Rotaries((functools.partial(sines_first, table),), {}, interleaved=True)
    blocks = []
    for index, layer in enumerate(body.h):
        attention = separate_attention(layer.attn, Place(model.config, index, rotaries))
        blocks.append(BlockSpec(norm_spec(layer.ln_1, width), attention, None, read_mlp(layer.mlp), parallel=True))
    return _model(model, body.wte, rotaries, blocks, body.ln_f)


def _model(model: Any, embedding: Any, rotaries: Rotaries, blocks: list[BlockSpec], norm: Any) -> ModelSpec:
    head, width = model.get_output_embeddings(), model.config.hidden_size
    return ModelSpec(embedding, rotaries.calls, tuple(blocks), norm_spec(norm, width), head, model.dtype)
