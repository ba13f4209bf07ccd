"""Seeded models of the families that the decode step knows, and what runs them token by token."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.streaming import StreamingCache
from tests.support.tiny import fresh_model

VOCABULARY = 160
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
GROUPED = BASE | {"num_key_value_heads": 2}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama, one head of keys": ("LlamaConfig", BASE | {"num_key_value_heads": 1}),
    "llama, three heads of queries to one of keys": (
        "LlamaConfig",
        BASE | {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "llama, biases": ("LlamaConfig", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("LlamaConfig", GROUPED | {"head_dim": 64}),
    "llama, gelu": ("LlamaConfig", GROUPED | {"hidden_act": "gelu"}),
    "llama 3": (
        "LlamaConfig",
        GROUPED
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
    "llama, tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", BASE),
    "gpt_neox, one after the other": ("GPTNeoXConfig", BASE | {"use_parallel_residual": False}),
    "gpt_neox, all rotary": (
        "GPTNeoXConfig",
        BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ),
}


def make(name: str) -> Any:
    """A seeded model in which a wrong position, bias or norm shows."""
    kind, sizes = KNOWN[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**sizes)
    model = fresh_model(config, attn_implementation="sdpa", dtype=torch.float32)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for path, weights in model.named_parameters():
        noise = torch.randn(weights.shape, generator=generator)
        if weights.dim() < 2:
            weights += 0.15 * noise
        else:
            weights.copy_(noise if "embed" in path else 1.3 * noise / weights.shape[-1] ** 0.5)
    return model


def cache_of(model: Any, size: int, sinks: int = 4) -> StreamingCache:
    return StreamingCache(model.config, fit_positions(model), cache_size=size, num_sink_tokens=sinks)


def stream(model: Any, cache: StreamingCache, ids: Tensor, prompt: int) -> Tensor:
    """(tokens, vocabulary) logits: the prompt at once, the rest one by one."""
    name = cache_keyword(model)
    pieces = [ids[:, :prompt], *(ids[:, i : i + 1] for i in range(prompt, ids.shape[1]))]
    with torch.inference_mode(), StreamingHook(model, cache):
        return torch.cat([model(input_ids=piece, use_cache=True, **{name: cache}).logits[0] for piece in pieces])


def counted_calls(model: Any) -> list[int]:
    """Tokens of each call that the step of `model` serves from now on."""
    step, seen = model.forward.step, list[int]()
    program = step.program

    def noted(tokens: int, *rest: Any) -> Any:
        seen.append(tokens)
        return program(tokens, *rest)

    step.program = noted
    return seen


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the inputs that the plain forward gets from now on."""
    seen: list[int] = []
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape[1])
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    return seen
