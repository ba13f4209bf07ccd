"""Tiny models that need all parts of the fused kernels."""

from __future__ import annotations

from typing import Any

from tests.support.families import build

FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("llama", {}),
    "partial rotary, parallel, two norms": ("gpt_neox", {}),
    "one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "biases of some layers": ("qwen2", {}),
    "norms of heads": ("qwen3", {}),
    "window": ("mistral_window_16", {"sliding_window": 5}),
    "parallel, one norm": ("phi", {}),
    "norms of heads, LayerNorm with biases": ("phi", {"qk_layernorm": True}),
    "layers of several parts": ("phi3", {}),
    "scaled embeddings, tanh": ("gemma", {}),
    "soft caps": ("gemma2_window_16", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "norms of outputs, two rotaries": ("gemma3_window_16", {"sliding_window": 5}),
    "scaled logits, no rotary in some layers": ("cohere2_window_16", {"sliding_window": 5, "logit_scale": 0.25}),
    "neighbors as pairs": ("glm", {}),
    "copied keys": ("falcon_new", {}),
    "one key head": ("falcon", {}),
    "clipped": ("olmo", {"clip_qkv": 0.8}),
    "norm of all heads together": ("olmo2", {}),
    "weights of each head": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "scaled residuals": ("granite", {}),
    "squared ReLU": ("nemotron", {}),
}
"""What the kernels must be able to do: a family, and changes of its configuration."""


def build_fused(what: str) -> Any:
    """Return the model of an entry of `FUSED`."""
    name, changes = FUSED[what]
    return build(name, "eager" if "gemma2" in name else "sdpa", **changes)
