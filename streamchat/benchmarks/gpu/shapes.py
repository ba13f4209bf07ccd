"""Models of published shapes with random weights, made on the device itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from streamchat.base.errors import StreamchatError
from streamchat.base.formatting import human_bytes
from streamchat.models.device import free_memory

SLACK = 0.9
"""Share of the free memory that weights may take; the rest is for cache, temporaries and workspaces."""


def _smollm2_135m() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )


def _pythia_410m() -> PreTrainedConfig:
    return GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    )


def _smollm2_1_7b() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 130_000.0},
        tie_word_embeddings=True,
    )


def _llama3_8b() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )


SHAPES: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "135M": ("SmolLM2-135M shape", _smollm2_135m),
    "410M": ("Pythia-410M shape", _pythia_410m),
    "1.7B": ("SmolLM2-1.7B shape", _smollm2_1_7b),
    "8B": ("Llama-3-8B shape", _llama3_8b),
}
"""Name -> display name, and the configuration of the published model."""


def random_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """Return a model of the shape `name` in eval mode, with the initial weights of transformers.

    Its parameters are allocated and filled on `device`; the host never has a copy.

    Raises:
        StreamchatError: It does not fit into the free memory.
    """
    display, make = SHAPES[name]
    config = make()
    need, free = parameter_count(config) * dtype.itemsize, free_memory(device)
    if free is not None and need > SLACK * free:
        raise StreamchatError(
            f"skipped: {display} needs {human_bytes(need)} for its weights and {device} has {human_bytes(free)} free"
        )
    torch.manual_seed(1)
    with torch.device(device):
        model = _build(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def parameter_count(config: PreTrainedConfig) -> int:
    """Return the number of weights, without allocating any."""
    with torch.device("meta"):
        model = _build(config)
    return sum(each.numel() for each in model.parameters())


def _build(config: PreTrainedConfig, **options: Any) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config, **options)
