"""What a model folder holds, read without loading it: config, safetensors headers, tokenizer files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from streamchat.models.words import short

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "*.pt", "tf_model.h5", "flax_model.msgpack")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead")
MULTIMODAL_ENDING = "ForConditionalGeneration"
"""A model of text and images; transformers loads the text part of some as a causal language model."""
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Contents:
    """The weights of a folder, from their headers."""

    config: dict[str, Any]
    parameters: int
    """Numbers in all weights."""
    file_bytes: int
    dtypes: frozenset[str]
    """Number formats in safetensors' words: F32, BF16."""

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
    parameters = file_bytes = 0
    dtypes: set[str] = set()
    for path in weight_files(folder):
        for entry in read_header(path).values():
            parameters += math.prod(entry["shape"])
            dtypes.add(str(entry["dtype"]))
        file_bytes += path.stat().st_size
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise ModelNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json); copy the tokenizer files of the same model into it"
        )
    return Contents(config, parameters, file_bytes, frozenset(dtypes))


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
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelNotFoundError(f"{path} cannot be read ({short(error)}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"{path} is not a model's configuration; fetch the model again")
    return config


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


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype, shape and place in the safetensors file `path`; its length is checked.

    Raises:
        ModelNotFoundError: The file is cut off or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("its header is not one of safetensors")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        if not header or size != 8 + length + end:
            raise ValueError(f"{size:,} bytes long instead of {8 + length + end:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelNotFoundError(f"{path} is damaged ({short(error)}); fetch the model again") from error
    tensors: dict[str, dict[str, Any]] = header
    return tensors
