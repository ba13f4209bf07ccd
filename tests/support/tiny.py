"""Tiny random-weight models of real families, seeded, in float32 and eval mode."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

VOCABULARY = 160


def config_of(family: str, **changes: Any) -> Any:
    """The configuration of a 3-layer model of `family`."""
    base: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    match family:
        case "llama":
            base |= {"num_key_value_heads": 2}
            return transformers.LlamaConfig(**(base | changes))
        case "gpt_neox":
            base |= {"use_parallel_residual": True}
            base["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
            return transformers.GPTNeoXConfig(**(base | changes))
        case "gpt2":
            small = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2}
            return transformers.GPT2Config(**({"vocab_size": VOCABULARY} | small | changes))
        case "falcon_h1":  # attention and a recurrent state in every layer
            small = {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
            states = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_chunk_size": 16, "num_key_value_heads": 2}
            return transformers.FalconH1Config(**(base | small | states | changes))
        case "mamba":
            return transformers.MambaConfig(
                **({"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2} | changes)
            )
        case _:
            raise ValueError(family)


def fresh_model(config: Any, **options: Any) -> Any:
    """A causal LM with the weights that its class initializes, in eval mode."""
    auto: Any = transformers.AutoModelForCausalLM  # its class methods have no types
    return auto.from_config(config, **options).eval()


def tiny_model(family: str, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A model whose attention is far from uniform, so that a wrong position shows in the logits."""
    torch.manual_seed(seed)
    config = config_of(family, **changes)
    config._attn_implementation = attention
    model = fresh_model(config).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0, 0.12 if isinstance(module, nn.Linear) else 1.0)
        elif "Norm" in type(module).__name__:
            module.weight.uniform_(0.5, 1.5)
    return model


def ready(model: Any) -> Any:
    """Generation that never ends by itself."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def kv_of(layer: CacheLayerMixin) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer that holds tokens, (batch, num_kv_heads, seq_len, head_dim)."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    """(1, count) token ids."""
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))
