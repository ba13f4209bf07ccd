"""What a model folder holds, read without loading it: config, safetensors headers, tokenizer files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.base.errors import ModelError, ModelNotFoundError, UnsupportedModelError, short

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "*.pt", "tf_model.h5", "flax_model.msgpack")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead")
MULTIMODAL_ENDING = "ForConditionalGeneration"
"""A model of text and images; transformers loads the text part of some as a causal language model."""


@dataclass(frozen=True)
class Contents:
    """The weights of a folder, from their headers."""

    config: dict[str, Any]
    parameters: int
    """Numbers in all weights."""
    file_bytes: int

    def bytes_as(self, bytes_per_number: int) -> int:
        """Memory of the weights in another number format."""
        return self.parameters * bytes_per_number


def inspect(folder: Path) -> Contents:
    """Check that `folder` holds a whole causal language model that needs no code of its own.

    Raises:
        ModelNotFoundError: Something is missing or damaged.
        UnsupportedModelError: It is another kind of model, or in another file format.
    """
    config = read_config(folder)
    check_kind(config, str(folder))
    files = weight_files(folder)
    shapes = [shape for path in files for shape in tensor_shapes(path)]
    check_sizes(config, shapes, str(folder))
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ModelNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json); copy the tokenizer files of the same model into it"
        )
    return Contents(config, sum(map(math.prod, shapes)), sum(path.stat().st_size for path in files))


def is_whole(folder: Path) -> bool:
    """Whether `inspect` finds nothing to object to."""
    try:
        inspect(folder)
    except ModelError:
        return False
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of `folder`.

    Raises:
        ModelNotFoundError: It is missing or not JSON.
        UnsupportedModelError: The folder holds an adapter only.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / "adapter_config.json").is_file():
            raise UnsupportedModelError(
                f"{folder} holds an adapter (LoRA), not a model; merge it into its base model and save that"
            ) from None
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"give the file itself: --model {ggufs[0]}" if ggufs else "give a folder saved with save_pretrained"
        raise ModelNotFoundError(f"{folder} has no config.json, so it is no model folder; {hint}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"{path} cannot be read ({short(error)}); fetch the model again") from error
    if not isinstance(config, dict) or not isinstance(config.get("architectures") or [], list):
        raise ModelNotFoundError(f"{path} is not a model's configuration; fetch the model again")
    return config


def check_sizes(config: dict[str, Any], shapes: list[tuple[int, ...]], where: str) -> None:
    """Refuse a configuration that describes a model far larger than its weights, which would never finish loading.

    Args:
        config: The parsed `config.json`, or a GGUF file's metadata.
        shapes: Shapes of all tensors.
        where: Folder or file, for the message.

    Raises:
        ModelNotFoundError: More layers than tensors, or a size above every dimension.
    """
    largest = max((size for shape in shapes for size in shape), default=0)
    for name, value in _numbers(config):
        if LAYERS.search(name) and value > max(len(shapes), FEW):
            held = f"{len(shapes):,} tensors"
        elif SIZES.search(name) and value > max(largest, FEW) and "quantization_config" not in config:
            held = f"no tensor with a dimension above {largest:,}"
        else:
            continue
        raise ModelNotFoundError(f"{where} says {name} = {value:,} but has {held}; fetch the model again")


FEW = 1_000
"""Sizes up to this are never refused here: they cost nothing to try."""
LAYERS = re.compile(r"(layers?|block_count|n_blocks|num_blocks)$")
SIZES = re.compile(
    r"(^|[._])(hidden_size|intermediate_size|vocab_size|head_dim|d_model|n_embd|num_attention_heads|"
    r"num_key_value_heads|n_head|embedding_length|feed_forward_length|head_count|head_count_kv)$"
)


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and value == value and abs(value) != math.inf:
            yield name, int(value)


def check_kind(config: dict[str, Any], where: str) -> None:
    """Refuse what is known, from its config alone, not to write text token by token.

    Raises:
        UnsupportedModelError: Encoder-only, encoder-decoder, a base model without output layer, or foreign code.
    """
    named = [str(name) for name in config.get("architectures") or ()]
    kind = str(config.get("model_type") or "unknown")
    has_text_part = isinstance(config.get("text_config"), dict) and not config.get("is_encoder_decoder")
    endings = (*CAUSAL_ENDINGS, MULTIMODAL_ENDING) if has_text_part else CAUSAL_ENDINGS
    if named and not any(name.endswith(endings) for name in named):
        raise UnsupportedModelError(
            f"{where} is a {named[0]} ({kind}), not a causal language model; choose one whose config.json names a "
            "...ForCausalLM architecture"
        )
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"{where} is an encoder-decoder model ({kind}), which has no single growing cache; choose a causal "
            "language model"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`, all of them present.

    Raises:
        ModelNotFoundError: None there, or parts are missing.
        UnsupportedModelError: The weights are in another format.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        names = shard_names(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelNotFoundError(
                f"{folder} is incomplete: {len(missing)} of {len(names)} weight files are missing ({missing[0]} is the "
                "first); fetch the model again"
            )
        return [folder / name for name in names]
    for pattern in OTHER_WEIGHTS:
        if found := sorted(folder.glob(pattern)):
            raise UnsupportedModelError(
                f"{folder} has its weights only as {found[0].name}, a format that can run code; convert it once with "
                f"transformers: from_pretrained, then save_pretrained, which writes {WEIGHTS}"
            )
    raise ModelNotFoundError(f"{folder} has no weights ({WEIGHTS}); fetch the model again")


def shard_names(index: Path) -> list[str]:
    """The file names that a safetensors index lists, in order.

    Raises:
        ModelNotFoundError: The index is damaged or points outside its folder.
    """
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(f"{index} cannot be read ({short(error)}); fetch the model again") from error
    if not names or any(Path(name).name != name for name in names):
        raise ModelNotFoundError(f"{index} does not name files beside it; fetch the model again")
    return names


def tensor_shapes(path: Path) -> list[tuple[int, ...]]:
    """The shapes of all tensors in the safetensors file `path`, whose header and length are checked.

    Raises:
        ModelNotFoundError: The file is cut off or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - not a dict
        if not shapes:
            raise ValueError("it holds no tensor")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotFoundError(f"{path} is damaged ({short(error)}); fetch the model again") from error
    return shapes
