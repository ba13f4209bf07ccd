"""The parts of a model that a decode step needs, read from the model's own modules, for the supported families."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, (1, n) positions) -> cos and sin, (1, n, rotary_dim) each, as the attention's heads are rotated."""


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm, or LayerNorm if `is_layer_norm`."""

    weight: Tensor
    """(width,) float32; (heads, head_dim) if each head has its own weights."""
    bias: Tensor | None
    """Like `weight`."""
    eps: float
    is_layer_norm: bool
    whole: bool = False
    """For queries and keys: all heads of a token are normalized together; weight: (heads * head_dim,)."""


@dataclass(frozen=True)
class QkvLayout:
    """Where queries, keys and values are in the concatenated outputs of `qkv_proj`, in heads. The first is a query.

    The query heads that share a key head are next to each other.
    """

    query_group_stride: int
    """From the first query of a key head to that of the next key head."""
    key_start: int
    key_stride: int
    value_start: int
    value_stride: int
    copies: int = 1
    """Consecutive cached key heads that have the same key and value (Falcon); strides are from group to group."""


def separate(num_heads: int, num_kv_heads: int) -> QkvLayout:
    """Return the layout of all queries, then all keys, then all values."""
    return QkvLayout(num_heads // num_kv_heads, num_heads, 1, num_heads + num_kv_heads, 1)


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of a block. Layers in a tuple share their input; their outputs are concatenated."""

    qkv_proj: tuple[nn.Module, ...]
    layout: QkvLayout
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Factor on the scores."""
    o_proj: nn.Module
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    rotary: int | None = 0
    """Index of the model's `rotaries`; None for an attention without positions."""
    interleaved: bool = False
    """Neighbors are rotated as pairs, instead of the two halves."""
    window: int | None = None
    """Number of tokens that a token sees, including itself; None for all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    clip: float | None = None
    """Largest magnitude of queries, keys and values."""


@dataclass(frozen=True)
class MlpSpec:
    """The MLP of a block."""

    up_proj: tuple[nn.Module, ...]
    """(gate, up), or one layer."""
    act: str
    """`silu`, `gelu`, `gelu_tanh`, `relu` or `relu2`; '' if it is another function."""
    down_proj: nn.Module
    fused: bool = False
    """The first half of the rows of the one layer is the gate, the other half is up."""


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block."""

    input_norm: NormSpec | None
    attention: AttentionSpec
    mlp_norm: NormSpec | None
    """None: the MLP gets what the attention gets if `parallel`, else the sum as it is."""
    mlp: MlpSpec
    attention_out_norm: NormSpec | None = None
    """Applied to the attention's output before it is added."""
    mlp_out_norm: NormSpec | None = None
    parallel: bool = False
    """The MLP reads the input of the block, instead of that plus the attention's output."""
    residual_scale: float = 1.0
    """Factor on each output before it is added."""


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model from ids to logits."""

    embedding: nn.Module
    rotaries: tuple[Rotary, ...]
    blocks: tuple[BlockSpec, ...]
    norm: NormSpec
    head: nn.Module
    dtype: torch.dtype
    embedding_scale: float = 1.0
    """Factor on the embeddings, as the model rounds it to its dtype."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def linear_layers(self) -> list[Any]:
        """All layers that are a product with a weight matrix."""
        layers: list[Any] = [self.head]
        for block in self.blocks:
            layers += [*block.attention.qkv_proj, block.attention.o_proj, *block.mlp.up_proj, block.mlp.down_proj]
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
        heads = attention.q_proj.out_features // attention.head_dim
        kv_heads = attention.k_proj.out_features // attention.head_dim
        spec = AttentionSpec(
            qkv_proj=(attention.q_proj, attention.k_proj, attention.v_proj),
            layout=separate(heads, kv_heads),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=attention.head_dim,
            scale=attention.scaling,
            o_proj=attention.o_proj,
            q_norm=None if q_norm is None else _rms(q_norm),
            k_norm=None if k_norm is None else _rms(k_norm),
        )
        mlp_spec = MlpSpec((mlp.gate_proj, mlp.up_proj), activation_name(mlp.act_fn), mlp.down_proj)
        blocks.append(BlockSpec(_rms(layer.input_layernorm), spec, _rms(layer.post_attention_layernorm), mlp_spec))
    head = model.get_output_embeddings()
    return ModelSpec(body.embed_tokens, (body.rotary_emb,), tuple(blocks), _rms(body.norm), head, model.dtype)


def _neox(model: Any) -> ModelSpec:
    """GPT-NeoX: Pythia."""
    body = model.gpt_neox
    blocks = []
    for layer in body.layers:
        attention, mlp = layer.attention, layer.mlp
        heads = attention.query_key_value.out_features // (3 * attention.head_size)
        spec = AttentionSpec(
            qkv_proj=(attention.query_key_value,),
            layout=QkvLayout(3, 1, 3, 2, 3),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=attention.head_size,
            scale=attention.scaling,
            o_proj=attention.dense,
        )
        mlp_spec = MlpSpec((mlp.dense_h_to_4h,), activation_name(mlp.act), mlp.dense_4h_to_h)
        norms = _layer_norm(layer.input_layernorm), _layer_norm(layer.post_attention_layernorm)
        blocks.append(BlockSpec(norms[0], spec, norms[1], mlp_spec, parallel=layer.use_parallel_residual))
    head, norm = model.get_output_embeddings(), _layer_norm(body.final_layer_norm)
    return ModelSpec(body.embed_in, (body.rotary_emb,), tuple(blocks), norm, head, model.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def activation_name(module: Any) -> str:
    """Return which of `ACTIVATIONS` a module computes; '' for another function."""
    x = torch.linspace(-8, 8, 1000)
    with torch.no_grad():
        found = module(x)
    close = {name for name, function in ACTIVATIONS.items() if torch.allclose(found, function(x), rtol=0, atol=1e-5)}
    return close.pop() if close else ""


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
