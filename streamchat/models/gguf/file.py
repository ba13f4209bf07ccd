"""Metadata of a GGUF file, and its transformers config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError, raise_limit, short
from streamchat.models.folder import check_sizes
from streamchat.models.gguf.tokenizer import USE_OTHER_FORMAT, end_ids, special_ids


def open_gguf(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the reader of `path`, and its metadata as plain Python values.

    Raises:
        ModelNotFoundError: The file is not a readable GGUF file, or its metadata describe a far larger model.
        UnsupportedModelError: The file is one part of a split model.
    """
    from streamchat.models.gguf.reader import Reader

    try:
        reader: Any = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        shapes = [tuple(int(size) for size in tensor.shape) for tensor in reader.tensors]
    except Exception as error:  # the reader raises errors of many kinds for truncated files
        raise_limit(error)
        raise ModelNotFoundError(
            f"{path} is not a complete GGUF file ({short(error)}); fetch it again or choose another with --model"
        ) from error
    if "general.architecture" not in metadata or not reader.tensors:
        raise ModelNotFoundError(f"{path} contains no model weights; choose another file with --model")
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModelError(f"{path} is one of {parts} parts; join them first (`llama-gguf-split --merge`)")
    check_sizes(metadata, shapes, str(path))
    return reader, metadata


def read_config(path: Path, reader: Any, metadata: dict[str, Any]) -> Any:
    """Return the transformers config of a GGUF file.

    Raises:
        UnsupportedModelError: The architecture or its RoPE scaling is not supported.
    """
    from transformers import AutoConfig, modeling_gguf_pytorch_utils

    from streamchat.models.gguf.reader import WithoutLists, shared

    architecture = str(metadata["general.architecture"])
    library: Any = modeling_gguf_pytorch_utils
    try:
        with shared(WithoutLists(reader)):
            values = dict(library.load_gguf_checkpoint(str(path), return_tensors=False)["config"])
        values.setdefault("vocab_size", len(metadata.get("tokenizer.ggml.tokens") or ()))
        config: Any = AutoConfig.for_model(str(values.pop("model_type")), **values)
    except Exception as error:
        raise_limit(error)
        known = architecture in library.GGUF_SUPPORTED_ARCHITECTURES
        reason = short(error) if known else "transformers does not read GGUF files of that architecture"
        raise UnsupportedModelError(
            f"{path} is a {architecture!r} model and cannot be read: {reason}; {USE_OTHER_FORMAT}"
        ) from error
    _restore_rope_scaling(path, reader, metadata, architecture, config)
    for name, index in special_ids(metadata).items():
        if name != "unk":
            setattr(config, f"{name}_token_id", index)
    ends = end_ids(metadata)
    config.eos_token_id = ends[0] if len(ends) == 1 else (ends or None)
    # entries of the file that do not belong in a saved config
    for name in ("unk_token_id", "_name_or_path", "_model_name_or_path"):
        if name in config.__dict__:
            delattr(config, name)
    return config


def _restore_rope_scaling(path: Path, reader: Any, metadata: dict[str, Any], architecture: str, config: Any) -> None:
    """Set the RoPE scaling, which GGUF stores outside the fields that transformers reads; long text needs it."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    scaling = str(metadata.get(f"{architecture}.rope.scaling.type", "none"))
    theta = metadata.get(f"{architecture}.rope.freq_base")
    if "rope_freqs.weight" in tensors:
        config.rope_parameters = _llama3_scaling(path, tensors["rope_freqs.weight"], float(theta or 10000.0), config)
    elif scaling == "linear":
        factor = float(metadata.get(f"{architecture}.rope.scaling.factor") or 1.0)
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    elif scaling != "none" or any(name.startswith("rope_factors") for name in tensors):
        raise UnsupportedModelError(
            f"{path} uses RoPE scaling ({scaling if scaling != 'none' else 'longrope'}) that is not supported in GGUF "
            f"files; {USE_OTHER_FORMAT}"
        )


def _llama3_scaling(path: Path, tensor: Any, theta: float, config: Any) -> dict[str, Any]:
    """Return the RoPE parameters of Llama 3.1 and later, which store a divisor for each rotary frequency."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divisors = torch.from_numpy(tensor.data.copy()).flatten().float()
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.rope_parameters = parameters
    rotary, _scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, 2 * len(rotary), 2).float() / (2 * len(rotary)))
    if len(divisors) != len(rotary) or not torch.allclose(plain / rotary, divisors, rtol=1e-3):
        raise UnsupportedModelError(
            f"{path} uses RoPE scaling with factors that are not those of Llama 3; {USE_OTHER_FORMAT}"
        )
    return parameters
