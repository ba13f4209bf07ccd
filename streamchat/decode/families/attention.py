"""Reads attention modules."""

from __future__ import annotations

from typing import Any

import torch

from streamchat.decode.families.modules import UnreadableError, first_of, read_norm
from streamchat.decode.spec import BY_HEAD, AttentionSpec, NormSpec, separate


def read_attention(attention: Any, **more: Any) -> AttentionSpec:
    """Return the spec of an attention with separate projections, or with one for queries, then keys, then values.

    Args:
        attention: The module.
        more: Members of the spec that the module does not show.

    Raises:
        UnreadableError: It has a part that a decode step does not compute.
    """
    dim: int = attention.head_dim
    fused = getattr(attention, "qkv_proj", None)
    if fused is None:
        projections: tuple[Any, ...] = attention.q_proj, attention.k_proj, attention.v_proj
        heads, kv_heads = (layer.out_features // dim for layer in projections[:2])
    else:
        projections = (fused,)
        kv_heads = int(attention.num_key_value_heads)
        heads = fused.out_features // dim - 2 * kv_heads
    return AttentionSpec(
        qkv_proj=projections,
        layout=separate(heads, kv_heads),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=scale_of(attention, dim),
        o_proj=first_of(attention, "o_proj", "dense", "out_proj"),
        q_norm=_head_norm(attention, "q", dim, heads),
        k_norm=_head_norm(attention, "k", dim, kv_heads),
        **more,
    )


def scale_of(attention: Any, head_dim: int) -> float:
    """Return the factor on the scores."""
    for name in ("scaling", "inv_norm_factor"):
        if isinstance(getattr(attention, name, None), float | int):
            return float(getattr(attention, name))
    divisor = getattr(attention, "scale_attn", None)  # GPT-J
    return head_dim**-0.5 if divisor is None else 1 / float(divisor)


def fused_by_head(projection: Any, attention: Any, **more: Any) -> AttentionSpec:
    """Return the spec of an attention whose projection gives query, key and value of each head in turn."""
    dim = int(getattr(attention, "head_size", None) or attention.head_dim)
    heads = projection.out_features // (3 * dim)
    return AttentionSpec(
        qkv_proj=(projection,),
        layout=BY_HEAD,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scale=scale_of(attention, dim),
        o_proj=first_of(attention, "dense", "o_proj"),
        **more,
    )


def _head_norm(attention: Any, which: str, dim: int, heads: int) -> NormSpec | None:
    module = getattr(attention, f"{which}_norm", None) or getattr(attention, f"{which}_layernorm", None)
    if module is None:
        return None
    if hasattr(module, "norms"):  # StableLM: a norm per head
        each = [read_norm(norm) for norm in module.norms]
        if any(norm.bias is not None for norm in each):
            raise UnreadableError("norms of heads have biases")
        weights = torch.stack([norm.weight for norm in each])
        return NormSpec(weights, None, each[0].eps, each[0].is_layer_norm)
    whole = heads > 1 and module.weight.shape == (heads * dim,)
    return read_norm(module, whole=whole)
