"""The folder of an adapter: its config, and the header of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from streamchat.models.adapters import _matrices, find_adapters
from tools.fuzz.target import Target

CONFIG, WEIGHTS = b"C", b"W"
"""First byte of an input: which of the two files it is."""


def run(data: bytes) -> None:
    """Find the adapter in a folder in which one file is the input."""
    folder = Path("adapter")
    folder.mkdir(exist_ok=True)
    files = {CONFIG: seeds()["config"][1:], WEIGHTS: seeds()["weights"][1:]}
    if data[:1] in files:
        files[data[:1]] = data[1:]
    (folder / "adapter_config.json").write_bytes(files[CONFIG])
    weights = folder / "adapter_model.safetensors"
    weights.unlink(missing_ok=True)  # the last one may still be mapped
    weights.write_bytes(files[WEIGHTS])
    for adapter in find_adapters(str(folder)):
        assert isinstance(adapter.base, str)
        _matrices(adapter)


def seeds() -> dict[str, bytes]:
    """Both files as peft writes them."""
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "tiny", "use_dora": False, "lora_alpha": 4}
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = save({f"{layer}A.weight": np.zeros((2, 4), np.float32), f"{layer}B.weight": np.zeros((4, 2), np.float32)})
    dora = {**config, "use_dora": True}
    return {
        "config": CONFIG + json.dumps(config).encode(),
        "dora": CONFIG + json.dumps(dora).encode(),
        "weights": WEIGHTS + weights,
    }


WORDS = (
    *b'null [] {} "LORA" "peft_type" "megatron_config" lora_A __metadata__ \\u001b[2J "shape":[]'.split(),
    b'"streamchat.layers":"{}"',
    b"\xff" * 8,
)
TARGET = Target(
    "adapter",
    run,
    seeds,
    ("streamchat.models.adapters", "streamchat.models.folder"),
    words=WORDS,
    suite_runs=200,
)
