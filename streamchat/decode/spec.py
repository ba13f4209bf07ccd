"""The parts of a model that a decode step needs, read from the model's own modules, for the supported families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm, or LayerNorm if `is_layer_norm`."""

    weight: Tensor
    """(width,) float32."""
    bias: Tensor | None
    """(width,) float32."""
    eps: float
    is_layer_norm: bool


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block. Layers in a tuple share their input; their outputs are concatenated."""

    input_norm: NormSpec
    qkv_proj: tuple[nn.Module, ...]
    """Queries, keys and values: three layers, or one fused layer."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Factor on the attention scores."""
    o_proj: nn.Module
    post_attention_norm: NormSpec
    up_proj: tuple[nn.Module, ...]
    """(gate, up), or one layer."""
    act: nn.Module
    down_proj: nn.Module
    qkv_by_head: bool = False
    """The output is (q, k, v) of each head in turn, instead of all queries, all keys, all values."""
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    parallel_residual: bool = False
    """The MLP gets the input of the block, instead of that plus the attention's output."""


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model from ids to logits."""

    embedding: nn.Module
    rotary: nn.Module
    blocks: tuple[BlockSpec, ...]
    norm: NormSpec
    head: nn.Module
    dtype: torch.dtype

    @property
    def linear_layers(self) -> list[Any]:
        """All layers that are a product with a weight matrix."""
        layers: list[Any] = [self.head]
        for block in self.blocks:
            layers += [*block.qkv_proj, block.o_proj, *block.up_proj, block.down_proj]
        return layers


def model_spec(model: Any) -> ModelSpec | None:
    """Return the spec of `model` (a causal LM of transformers, in eval mode); None if it is not supported.

    The classes themselves are matched: subclasses and classes of the same name from elsewhere are not supported.
    """
    read = _FAMILIES.get(type(model).__name__)
    known = read is not None and type(model).__module__.startswith("transformers.models.")
    return read(model) if known and read is not None and _is_plain(model.config) else None


def _is_plain(config: Any) -> bool:
    """Return whether every layer attends to the whole cache, with the attention that is re-implemented here."""
    kinds = getattr(config, "layer_types", None) or ()
    sliding = getattr(config, "sliding_window", None) is not None and not kinds
    return config._attn_implementation == "sdpa" and not sliding and all(kind == "full_attention" for kind in kinds)


def _llama(model: Any) -> ModelSpec:
    """Llama and its relatives: Mistral, Qwen2 (biases), Qwen3 (norms of queries and keys)."""
    body = model.model
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        blocks.append(
            BlockSpec(
                input_norm=_rms(layer.input_layernorm),
                qkv_proj=(attention.q_proj, attention.k_proj, attention.v_proj),
                q_norm=None if q_norm is None else _rms(q_norm),
                k_norm=None if k_norm is None else _rms(k_norm),
                num_heads=attention.q_proj.out_features // attention.head_dim,
                num_kv_heads=attention.k_proj.out_features // attention.head_dim,
                head_dim=attention.head_dim,
                scale=attention.scaling,
                o_proj=attention.o_proj,
                post_attention_norm=_rms(layer.post_attention_layernorm),
                up_proj=(mlp.gate_proj, mlp.up_proj),
                act=mlp.act_fn,
                down_proj=mlp.down_proj,
            )
        )
    head = model.get_output_embeddings()
    return ModelSpec(body.embed_tokens, body.rotary_emb, tuple(blocks), _rms(body.norm), head, model.dtype)


def _neox(model: Any) -> ModelSpec:
    """GPT-NeoX: Pythia."""
    body = model.gpt_neox
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.attention, layer.mlp
        heads = attention.query_key_value.out_features // (3 * attention.head_size)
        blocks.append(
            BlockSpec(
                input_norm=_layer_norm(layer.input_layernorm),
                qkv_proj=(attention.query_key_value,),
                qkv_by_head=True,
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=attention.head_size,
                scale=attention.scaling,
                o_proj=attention.dense,
                post_attention_norm=_layer_norm(layer.post_attention_layernorm),
                up_proj=(mlp.dense_h_to_4h,),
                act=mlp.act,
                down_proj=mlp.dense_4h_to_h,
                parallel_residual=layer.use_parallel_residual,
            )
        )
    head, norm = model.get_output_embeddings(), _layer_norm(body.final_layer_norm)
    return ModelSpec(body.embed_in, body.rotary_emb, tuple(blocks), norm, head, model.dtype)


def _rms(module: Any) -> NormSpec:
    return NormSpec(module.weight.detach().float(), None, module.variance_epsilon, is_layer_norm=False)


def _layer_norm(module: Any) -> NormSpec:
    bias = None if module.bias is None else module.bias.detach().float()
    return NormSpec(module.weight.detach().float(), bias, module.eps, is_layer_norm=True)


_FAMILIES: dict[str, Callable[[Any], ModelSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
    "GPTNeoXForCausalLM": _neox,
}
