"""Whether a saved cache belongs to this model: digests that differ where its numbers or ids would."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from streamchat.models.stored import stored_tensors
from streamchat.speed.linear import packed_layers

# What a configuration says about files and texts, and not about the computation.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
SAMPLES = 64
"""Values of each weight tensor that are looked at: all of them would take seconds."""


def computed_config(config: Any) -> dict[str, Any]:
    """The part of a configuration that the computation depends on."""
    return {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}


@torch.inference_mode()
def model_fingerprint(model: Any) -> str:
    """Of configuration and weights: shapes of all, and some values of each, spread over it.

    The values are those of the loaded number format: the same model in another one, or with packed
    weights, has another fingerprint.
    """
    digest = hashlib.sha256(json.dumps(computed_config(model.config), sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        for part in stored_tensors(weight):
            flat = part.detach().reshape(-1)
            step = max(1, flat.numel() // SAMPLES)
            digest.update(flat[::step][:SAMPLES].float().cpu().numpy().tobytes())
    for name, layer in packed_layers(model).items():
        scales = layer.packed.scales.reshape(-1)
        digest.update(f"{name} {layer.packed.kind}".encode())
        digest.update(scales[:: max(1, scales.numel() // SAMPLES)][:SAMPLES].float().numpy().tobytes())
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any, format_parts: tuple[object, ...]) -> str:
    """Of the vocabulary and of how turns are written: where it differs, ids mean something else. Some 40 ms."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    text = "\0".join([*by_id, str(max(vocabulary.values(), default=0)), json.dumps(format_parts)])
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
