"""What a decode step needs to know of a model, read from its own modules, for the families known here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NormOf:
    """RMSNorm, or LayerNorm where `centred`."""

    weight: Tensor
    """(width,) float32."""
    bias: Tensor | None
    """(width,) float32."""
    eps: float
    centred: bool


@dataclass(frozen=True)
class BlockOf:
    """One transformer block. Layers in a tuple read the same input and stand side by side."""

    before: NormOf
    read: tuple[nn.Module, ...]
    """Queries, keys and values."""
    by_head: bool
    """Query, key and value follow each other head by head, instead of all queries, all keys, all values."""
    q_norm: NormOf | None
    k_norm: NormOf | None
    heads: int
    kv_heads: int
    dim: int
    scale: float
    """Of the scores."""
    write: nn.Module
    between: NormOf
    widen: tuple[nn.Module, ...]
    """(gate, up), or one layer."""
    act: nn.Module
    narrow: nn.Module
    parallel: bool
    """The MLP reads what the attention read."""


@dataclass(frozen=True)
class ModelOf:
    """A causal language model from ids to logits."""

    embedding: nn.Module
    rotary: nn.Module
    blocks: tuple[BlockOf, ...]
    norm: NormOf
    head: nn.Module
    dtype: torch.dtype


def describe(model: Any) -> ModelOf | None:
    """`model` (a causal LM of transformers, in eval mode), if it is of a family known here and nothing is unusual.

    Known are the classes themselves, not what looks or calls itself alike.
    """
    read = _FAMILIES.get(type(model).__name__)
    known = read is not None and type(model).__module__.startswith("transformers.models.")
    return read(model) if known and read is not None and _is_plain(model.config) else None


def _is_plain(config: Any) -> bool:
    """Every layer attends to all that the cache holds, with the attention that is made anew here."""
    kinds = getattr(config, "layer_types", None) or ()
    sliding = getattr(config, "sliding_window", None) is not None and not kinds
    return config._attn_implementation == "sdpa" and not sliding and all(kind == "full_attention" for kind in kinds)


def _llama(model: Any) -> ModelOf:
    """Llama and its kin: Mistral, Qwen2 (biases), Qwen3 (norms of queries and keys)."""
    body = model.model
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        blocks.append(
            BlockOf(
                before=_rms(layer.input_layernorm),
                read=(attention.q_proj, attention.k_proj, attention.v_proj),
                by_head=False,
                q_norm=None if q_norm is None else _rms(q_norm),
                k_norm=None if k_norm is None else _rms(k_norm),
                heads=attention.q_proj.out_features // attention.head_dim,
                kv_heads=attention.k_proj.out_features // attention.head_dim,
                dim=attention.head_dim,
                scale=attention.scaling,
                write=attention.o_proj,
                between=_rms(layer.post_attention_layernorm),
                widen=(mlp.gate_proj, mlp.up_proj),
                act=mlp.act_fn,
                narrow=mlp.down_proj,
                parallel=False,
            )
        )
    head = model.get_output_embeddings()
    return ModelOf(body.embed_tokens, body.rotary_emb, tuple(blocks), _rms(body.norm), head, model.dtype)


def _neox(model: Any) -> ModelOf:
    """GPT-NeoX: Pythia."""
    body = model.gpt_neox
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.attention, layer.mlp
        heads = attention.query_key_value.out_features // (3 * attention.head_size)
        blocks.append(
            BlockOf(
                before=_layer_norm(layer.input_layernorm),
                read=(attention.query_key_value,),
                by_head=True,
                q_norm=None,
                k_norm=None,
                heads=heads,
                kv_heads=heads,
                dim=attention.head_size,
                scale=attention.scaling,
                write=attention.dense,
                between=_layer_norm(layer.post_attention_layernorm),
                widen=(mlp.dense_h_to_4h,),
                act=mlp.act,
                narrow=mlp.dense_4h_to_h,
                parallel=layer.use_parallel_residual,
            )
        )
    head, norm = model.get_output_embeddings(), _layer_norm(body.final_layer_norm)
    return ModelOf(body.embed_in, body.rotary_emb, tuple(blocks), norm, head, model.dtype)


def _rms(module: Any) -> NormOf:
    return NormOf(module.weight.detach().float(), None, module.variance_epsilon, centred=False)


def _layer_norm(module: Any) -> NormOf:
    bias = None if module.bias is None else module.bias.detach().float()
    return NormOf(module.weight.detach().float(), bias, module.eps, centred=True)


_FAMILIES: dict[str, Callable[[Any], ModelOf]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
    "GPTNeoXForCausalLM": _neox,
}
