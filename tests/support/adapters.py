"""LoRA adapters made by hand, and the model that results from them by the definition."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
"""Layers of a tiny Llama that the adapters change."""


def random_matrices(model: Any, layers: tuple[str, ...] = LAYERS, *, rank: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Return random A and B for `layers`, by the names that peft gives them."""
    torch.manual_seed(seed)
    tensors = {}
    for layer in layers:
        rows, columns = model.get_submodule(layer).weight.shape
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, columns) * 0.3
        tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, rank) * 0.3
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], *, rank: int = 4, alpha: int = 8, **config: Any) -> Path:
    """Write an adapter as peft saves it; `config` replaces entries of its config."""
    folder.mkdir(parents=True)
    layers = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in tensors})
    entries = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/base",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": layers,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    save_file({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def add_by_definition(model: Any, tensors: Mapping[str, Tensor], scale: float) -> Any:
    """Change each layer to W + scale B A, in float32, and return the model."""
    for name, down in tensors.items():
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            weight = model.get_submodule(layer).weight
            weight.data = weight.data + scale * (tensors[f"{layer}.lora_B.weight"] @ down)
    return model
