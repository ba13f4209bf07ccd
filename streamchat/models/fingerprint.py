"""Whether a saved cache belongs to this model: digests that differ where its numbers or ids would."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch

from streamchat.models.quantize.weight_storage import stored_tensors
from streamchat.quantization.linear import quantized_layers

# What a configuration says about files and texts, and not about the computation.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
KIND = "2-"
"""What a fingerprint begins with. Those without looked at 64 values per tensor and are equal to none of today."""
_contents: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Model -> digest of the files it was loaded from."""


def know_contents(model: Any, digest: str) -> None:
    """Note the digest of the files that `model` was just loaded from, which saves hashing its tensors."""
    _contents[model] = digest


def computed_config(config: Any) -> dict[str, Any]:
    """The part of a configuration that the computation depends on."""
    return {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}


@torch.inference_mode()
def model_fingerprint(model: Any) -> str:
    """Of configuration and weights: names, shapes and number formats, and every byte of the values.

    The bytes are those of the files if `know_contents` was called for this model, else those in memory (about a second
    per GB). The same model in another number format, or with packed weights, has another fingerprint.
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
        digest.update(f"{name} {layer.quantized.kind}".encode())
        if contents is None:
            digest.update(_bytes_of(layer.quantized.scales))
    return KIND + digest.hexdigest()[:32]


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, in the order of its values, as `hashlib` takes them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tokenizer_fingerprint(tokenizer: Any, format_parts: tuple[object, ...]) -> str:
    """Of the vocabulary and of how turns are written: where it differs, ids mean something else. Some 40 ms."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    text = "\0".join([*by_id, str(max(vocabulary.values(), default=0)), json.dumps(format_parts)])
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
