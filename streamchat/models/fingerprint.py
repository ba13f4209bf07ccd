"""Fingerprints of a model and its tokenizer, to check that a saved cache belongs to them."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch

from streamchat.models.quantize.weight_storage import stored_tensors
from streamchat.quantization.experts import quantized_experts
from streamchat.quantization.linear import quantized_layers

# Entries of a configuration that do not affect the computation.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
FINGERPRINT_PREFIX = "2-"
"""Version prefix. Older fingerprints, without it, sampled 64 values per tensor and never match."""
_contents: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Model -> digest of the files that it was loaded from."""


def set_contents_digest(model: Any, digest: str) -> None:
    """Record the digest of the files that `model` was loaded from, so that its tensors need not be hashed."""
    _contents[model] = digest


def computed_config(config: Any) -> dict[str, Any]:
    """Return the entries of a configuration that affect the computation."""
    return {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}


@torch.inference_mode()
def model_fingerprint(model: Any) -> str:
    """Return a digest of configuration and weights: names, shapes, dtypes and every byte of the values.

    The bytes are those of the files if `set_contents_digest` was called for this model, else those in memory (about a
    second per GB). The fingerprint differs between dtypes, and between native and quantized weights.
    """
    digest = hashlib.sha256(json.dumps(computed_config(model.config), sort_keys=True, default=str).encode())
    contents = _contents.get(model)
    digest.update((contents or "").encode())
    for name, weight in model.named_parameters():
        for part in stored_tensors(weight):
            digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
            if contents is None:
                digest.update(_bytes_of(part))
    for name, layer in quantized_layers(model).items():
        digest.update(f"{name} {layer.quantized.layout}".encode())
        if contents is None:
            digest.update(_bytes_of(layer.quantized.scales))
    for name, experts in quantized_experts(model).items():
        digest.update(f"{name} {[whole.layout for whole in experts.wholes]}".encode())
    return FINGERPRINT_PREFIX + digest.hexdigest()[:32]


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor, in the order of its values, as a buffer for `hashlib`."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tokenizer_fingerprint(tokenizer: Any, format_parts: tuple[object, ...]) -> str:
    """Return a digest of the vocabulary and the chat format, which give ids their meaning. Takes about 40 ms."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    text = "\0".join([*by_id, str(max(vocabulary.values(), default=0)), json.dumps(format_parts)])
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
