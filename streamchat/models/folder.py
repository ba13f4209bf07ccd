"""Inspection of a model folder without loading it: config, safetensors headers, tokenizer files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError, raise_limit, short

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TILES = "tiles.safetensors"
"""The weights of a converted copy, which has tiles of quantized matrices; `tile_file` describes the format."""
LAYERS_ENTRY = "layers"
"""Entry of its header that describes the matrices."""
OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "*.pt", "tf_model.h5", "flax_model.msgpack")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead")
MULTIMODAL_ENDING = "ForConditionalGeneration"
"""A model for text and images; transformers loads the text part of some as a causal language model."""


@dataclass(frozen=True)
class Contents:
    """Config and size of the weights of a folder, from the file headers."""

    config: dict[str, Any]
    parameters: int
    """Number of parameters."""
    file_bytes: int
    kinds: frozenset[str] | None = None
    """The kinds of the quantized matrices that the weights consist of; None for native weights."""

    def bytes_as(self, bytes_per_number: int) -> int:
        """Return the size of the weights in another dtype."""
        return self.parameters * bytes_per_number


def inspect(folder: Path) -> Contents:
    """Check that `folder` holds a complete causal language model that needs no custom code, and return its contents.

    Raises:
        ModelNotFoundError: A file is missing or damaged.
        UnsupportedModelError: Another kind of model, or another file format.
    """
    config = read_config(folder)
    check_kind(config, str(folder))
    files = weight_files(folder)
    shapes = [shape for path in files for shape in tensor_shapes(path)]
    kinds = frozenset(str(each["layout"])[:4] for each in tile_layers(files[0]).values()) or None
    check_sizes(config, shapes, str(folder))
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ModelNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json); copy the tokenizer files of the same model into it"
        )
    return Contents(config, sum(map(math.prod, shapes)), sum(path.stat().st_size for path in files), kinds)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed `config.json` of `folder`.

    Raises:
        ModelNotFoundError: The file is missing or not JSON.
        UnsupportedModelError: The folder holds only an adapter.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / "adapter_config.json").is_file():
            raise UnsupportedModelError(
                f"{folder} holds an adapter (LoRA), not a model; give its base model to --model and this folder to "
                "--adapter"
            ) from None
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"give the file itself: --model {ggufs[0]}" if ggufs else "give a folder saved with save_pretrained"
        raise ModelNotFoundError(f"{folder} has no config.json, so it is not a model folder; {hint}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise_limit(error)
        raise ModelNotFoundError(f"{path} cannot be read ({short(error)}); fetch the model again") from error
    if not isinstance(config, dict) or not isinstance(config.get("architectures") or [], list):
        raise ModelNotFoundError(f"{path} is not a model's configuration; fetch the model again")
    return config


def check_sizes(config: dict[str, Any], shapes: list[tuple[int, ...]], where: str) -> None:
    """Refuse a configuration that describes a model far larger than its weights, which would never finish loading.

    Args:
        config: The parsed `config.json`, or the metadata of a GGUF file.
        shapes: Shapes of all tensors.
        where: Folder or file, for the message.

    Raises:
        ModelNotFoundError: There are more layers than tensors, or a size is larger than every dimension.
    """
    largest = max((size for shape in shapes for size in shape), default=0)
    for name, value in _numbers(config):
        if LAYERS.search(name) and value > max(len(shapes), FEW):
            actual = f"{len(shapes):,} tensors"
        elif SIZES.search(name) and value > max(largest, FEW) and "quantization_config" not in config:
            actual = f"no tensor with a dimension above {largest:,}"
        else:
            continue
        raise ModelNotFoundError(f"{where} says {name} = {value:,} but has {actual}; fetch the model again")


FEW = 1_000
"""Sizes up to this are never refused, because they are cheap to try."""
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
    """Refuse a model that, by its config, cannot generate text token by token.

    Raises:
        UnsupportedModelError: Encoder-only, encoder-decoder, a base model without output layer, or custom code.
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
    """Return the safetensors files of `folder`; all of them exist.

    Raises:
        ModelNotFoundError: There are none, or some are missing.
        UnsupportedModelError: The weights are in another format.
    """
    index = folder / INDEX
    if (folder / TILES).is_file():
        return [folder / TILES]
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
    """Return the file names in a safetensors index, sorted.

    Raises:
        ModelNotFoundError: The index is damaged or points outside its folder.
    """
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise_limit(error)
        raise ModelNotFoundError(f"{index} cannot be read ({short(error)}); fetch the model again") from error
    if not names or any(Path(name).name != name for name in names):
        raise ModelNotFoundError(f"{index} does not list files in its own folder; fetch the model again")
    return names


def tensor_shapes(path: Path) -> list[tuple[int, ...]]:
    """Check the header and length of the safetensors file `path`, and return the shapes of its tensors.

    Raises:
        ModelNotFoundError: The file is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()  # safetensors reports every failure to open a file as a missing one
        with safe_open(path, framework="np") as file:
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
            layers = _layers_in(file.metadata())
            shapes = [
                (layers[name]["rows"], layers[name]["columns"]) if name in layers else sizes[name] for name in sizes
            ]
        if not shapes:
            raise ValueError("it contains no tensors")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise_limit(error)
        raise ModelNotFoundError(f"{path} is damaged ({short(error)}); fetch the model again") from error
    return shapes


def tile_layers(path: Path) -> dict[str, Any]:
    """Return what the header of the safetensors file `path` says about its tiles, by name; empty if it has none."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return _layers_in(file.metadata())


def _layers_in(metadata: dict[str, str] | None) -> dict[str, Any]:
    found = json.loads((metadata or {}).get(LAYERS_ENTRY) or "{}")
    if not isinstance(found, dict):
        raise ValueError(f"its entry {LAYERS_ENTRY!r} is not an object")
    for name, layer in found.items():
        entries = layer if isinstance(layer, dict) else {}
        sizes = [entries.get(size) for size in ("rows", "columns")]
        if not all(type(size) is int and size > 0 for size in sizes) or type(entries.get("layout")) is not str:
            raise ValueError(f"it does not say how {name} is stored")
    return found
