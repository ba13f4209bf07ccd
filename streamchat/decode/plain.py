"""Which models the steps of torch operations compute."""

from __future__ import annotations

import torch

from streamchat.decode.spec import BY_HEAD, BlockSpec, ModelSpec, separate


def is_plain(model: ModelSpec) -> bool:
    """Return whether `model` has nothing that only the compiled kernels compute."""
    scaled = model.embedding_scale != 1 or model.logit_scale != 1 or model.logit_softcap is not None
    if scaled or len(model.rotaries) != 1:
        return False
    place = torch.zeros(1, 1, dtype=torch.long, device=model.norm.weight.device)
    width = model.rotaries[0](model.norm.weight, place)[0].shape[-1]
    return all(_is_plain_block(block, width) for block in model.blocks)


def _is_plain_block(block: BlockSpec, rotary_dim: int) -> bool:
    has_norms = block.input_norm is not None and block.mlp_norm is not None
    changes_outputs = block.attention_out_norm or block.mlp_out_norm or block.residual_scale != 1
    return bool(has_norms and not changes_outputs and not block.mlp.fused and _is_plain_attention(block, rotary_dim))


def _is_plain_attention(block: BlockSpec, rotary_dim: int) -> bool:
    of = block.attention
    if of.rotary is None or of.interleaved or of.window or of.softcap or of.clip:
        return False
    if of.layout == BY_HEAD:
        return of.q_norm is None
    norms = [norm for norm in (of.q_norm, of.k_norm) if norm is not None]
    plain_norms = all(norm.weight.ndim == 1 and not norm.whole and not norm.is_layer_norm for norm in norms)
    return of.layout == separate(of.num_heads, of.num_kv_heads) and rotary_dim == of.head_dim and plain_norms
