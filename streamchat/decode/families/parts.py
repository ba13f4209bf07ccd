"""Attention and MLP of a block, read from modules under the names that transformers uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from streamchat.decode.families.errors import UnsupportedPartError
from streamchat.decode.families.norms import norm_spec
from streamchat.decode.families.rotaries import Rotaries
from streamchat.decode.spec import AttentionSpec, MlpSpec, NormSpec, activation_name, separate

_GATED = ("gate_proj", "up_proj", "down_proj")
_UNGATED = (
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)


@dataclass(frozen=True)
class Place:
    """The layer of an attention, and what all layers share."""

    config: Any
    layer: int
    rotaries: Rotaries

    @property
    def layer_type(self) -> str | None:
        """The type of the layer, if layers have types."""
        kinds = getattr(self.config, "layer_types", None)
        return kinds[self.layer] if kinds else None

    @property
    def window(self) -> int | None:
        """Number of tokens that a token sees, including itself; None for all.

        Raises:
            UnsupportedPartError: The type of the layer is not supported.
        """
        if self.layer_type not in (None, "full_attention", "sliding_attention"):
            raise UnsupportedPartError(f"layers of type {self.layer_type} are not supported")
        size: int | None = getattr(self.config, "sliding_window", None)
        return None if self.layer_type == "full_attention" else size


def first_of(module: Any, *names: str) -> Any:
    """Return the first submodule that exists under one of `names`; None if none does."""
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def separate_attention(attention: Any, place: Place, has_positions: bool = True) -> AttentionSpec:
    """Read an attention whose queries, keys and values are separate layers, or rows of one layer in this order.

    Raises:
        UnsupportedPartError: It normalizes queries before it limits them (OLMoE).
    """
    dim: int = attention.head_dim
    fused = getattr(attention, "qkv_proj", None)
    if fused is None:
        layers: tuple[Any, ...] = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads, kv_heads = (layer.out_features // dim for layer in layers[:2])
    else:
        layers = (fused,)
        heads, kv_heads = place.config.num_attention_heads, place.config.num_key_value_heads
    clip, device = getattr(place.config, "clip_qkv", None), next(attention.parameters()).device
    q_norm = _head_norm(first_of(attention, "q_norm", "q_layernorm"), heads, dim, device)
    if clip is not None and q_norm is not None:
        raise UnsupportedPartError("queries are normalized before they are limited")
    return AttentionSpec(
        qkv_proj=layers,
        layout=separate(heads, kv_heads),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=float(getattr(attention, "scaling", dim**-0.5)),
        o_proj=first_of(attention, "o_proj", "dense", "out_proj"),
        q_norm=q_norm,
        k_norm=_head_norm(first_of(attention, "k_norm", "k_layernorm"), kv_heads, dim, device),
        rotary=place.rotaries.index(place.layer_type) if has_positions else None,
        interleaved=place.rotaries.interleaved,
        window=place.window,
        clip=clip,
    )


def _head_norm(module: Any, heads: int, dim: int, device: torch.device) -> NormSpec | None:
    """Read a norm of queries or keys: of each head, or of all heads together."""
    if module is None:
        return None
    weight = getattr(module, "weight", None)
    whole = weight is not None and weight.ndim == 1 and weight.numel() != dim
    return norm_spec(module, heads * dim if whole else dim, whole, device)


def read_mlp(mlp: Any) -> MlpSpec:
    """Read an MLP with or without a gate.

    Raises:
        UnsupportedPartError: Its layers have other names, or its activation is another function.
    """
    act = activation_name(first_of(mlp, "act_fn", "activation_fn", "act", "activation"))
    if not act:
        raise UnsupportedPartError("the activation is not supported")
    if hasattr(mlp, "gate_up_proj"):
        return MlpSpec((mlp.gate_up_proj,), act, mlp.down_proj, fused=True)
    if hasattr(mlp, "input_linear"):
        return MlpSpec((mlp.input_linear,), act, mlp.output_linear, fused=True)
    if all(hasattr(mlp, name) for name in _GATED):
        return MlpSpec((mlp.gate_proj, mlp.up_proj), act, mlp.down_proj)
    for up, down in _UNGATED:
        if hasattr(mlp, up) and hasattr(mlp, down):
            return MlpSpec((getattr(mlp, up),), act, getattr(mlp, down))
    raise UnsupportedPartError(f"the layers of {type(mlp).__name__} are not known")


def embedding_scale(embedding: Any, default: float = 1.0) -> float:
    """Return the factor on the embeddings, rounded to their dtype."""
    factor = torch.as_tensor(getattr(embedding, "embed_scale", default))
    return float(factor.to(embedding.weight.dtype))
