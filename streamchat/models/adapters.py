"""LoRA adapters: folders that peft saved, merged into a model's native weights when it is loaded.

Imports neither torch nor peft until a model is merged.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.base.errors import ConfigError, ModelNotFoundError, UnsupportedModelError, raise_limit, refuse, short
from streamchat.base.paths import user_path
from streamchat.base.progress import Progress
from streamchat.models.contents import folder_digest
from streamchat.models.folder import tensor_shapes
from streamchat.models.quiet import quiet

SEPARATOR = os.pathsep
"""Between the folders in the setting `adapter`."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Start of the names of all tensors that peft saves."""
OTHER_ADAPTER = "choose another adapter"
REFUSED = {
    "megatron_config": "makes peft import a Python module that the adapter names",
    "layer_replication": "repeats layers that share weights, so it cannot be merged",
}
"""Entries of an adapter's config that are refused, and why."""
_MATRIX = re.compile(r"(?P<layer>.+)\.(lora_|lora_embedding_)(?P<part>[AB])(\.weight)?")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on this machine."""

    folder: Path
    base: str
    """The model that it was trained on, as its config names it; '' if it does not."""

    @property
    def name(self) -> str:
        """Display name."""
        return self.folder.name

    @property
    def files(self) -> list[Path]:
        """The files that it is loaded from."""
        return [self.folder / CONFIG, self.folder / WEIGHTS]


def find_adapters(setting: str) -> tuple[Adapter, ...]:
    """Return the adapters that the setting `adapter` names, in the order in which they are merged.

    Raises:
        ModelNotFoundError: A folder does not exist or is damaged.
        UnsupportedModelError: It holds another kind of adapter, or a format that can run code.
    """
    return tuple(_inspect(user_path(text.strip()).absolute()) for text in setting.split(SEPARATOR) if text.strip())


def portable_setting(setting: str) -> str:
    """Return the setting with absolute paths, which are valid in any working directory."""
    return SEPARATOR.join(str(user_path(text.strip()).absolute()) for text in setting.split(SEPARATOR) if text.strip())


def _inspect(folder: Path) -> Adapter:
    if folder.suffix.lower() == ".gguf":
        raise UnsupportedModelError(
            f"{folder} is a GGUF file, and streamchat reads adapters as peft saves them; give a folder with {CONFIG}"
        )
    if not folder.is_dir():
        raise ModelNotFoundError(f"There is no adapter folder {str(folder)!r}; check the path after --adapter")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{folder} has no {CONFIG}, so it is not a LoRA adapter; give a folder that peft saved"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise_limit(error)
        raise ModelNotFoundError(
            f"{folder / CONFIG} cannot be read ({short(error)}); fetch the adapter again"
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{folder} holds an adapter of type {str(kind)[:40]!r}, and only LORA can be merged; {OTHER_ADAPTER}"
        )
    for entry, why in REFUSED.items():
        if config.get(entry):
            raise UnsupportedModelError(f"{folder} has {entry} in its config, which {why}; {OTHER_ADAPTER}")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UnsupportedModelError(
                f"{folder} has its weights only as adapter_model.bin, a format that can run code; load it once with "
                f"peft and save it again, which writes {WEIGHTS}"
            )
        raise ModelNotFoundError(f"{folder} has no weights ({WEIGHTS}); fetch the adapter again")
    tensor_shapes(folder / WEIGHTS)
    if config.get("use_dora") and not any(
        "lora_magnitude_vector" in name for name, _ in _named_shapes(folder / WEIGHTS)
    ):
        raise ModelNotFoundError(f"{folder} is a DoRA adapter without its magnitudes; fetch the adapter again")
    return Adapter(folder, str(config.get("base_model_name_or_path") or "")[:200])


def name_with(name: str, adapters: Sequence[Adapter]) -> str:
    """Return the display name of a model with its adapters: 'SmolLM2-135M-Instruct + my-lora'."""
    return " + ".join([name, *(adapter.name for adapter in adapters)])


def digest_with(digest: str, adapters: Sequence[Adapter], progress: Progress) -> str:
    """Return the digest of the model's files and of all adapters in their order; `digest` itself if there are none."""
    import hashlib

    if not adapters:
        return digest
    parts = [folder_digest(each.folder, each.files, name=each.name, progress=progress) for each in adapters]
    return hashlib.sha256(json.dumps([digest, *parts]).encode()).hexdigest()


def require_peft() -> None:
    """Require peft, which merges adapters.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--adapter needs peft; run: pip install 'streamchat[adapters]'")


def merge(model: Any, adapters: Sequence[Adapter], name: str, progress: Progress) -> Any:
    """Add the adapters to the weights of `model`, one after the other, and return the model.

    Each matrix becomes W + scale B A, computed in float32 and rounded to the dtype of W.

    Args:
        model: With native weights; changed in place.
        adapters: What `find_adapters` returned.
        name: Display name of the model without adapters, for messages.
        progress: Called with the stage; may raise to cancel.

    Raises:
        ConfigError: peft is not installed.
        UnsupportedModelError: An adapter was made for another model, or peft cannot merge it.
    """
    require_peft()
    for adapter in adapters:
        progress(f"Merging {adapter.name}", 0, 0, "")
        _check_base(model, adapter, name)
        with quiet(), refuse(f"The adapter {adapter.folder} cannot be merged into {name}", OTHER_ADAPTER):
            model = _merged(model, adapter)
    model.eval()
    model.requires_grad_(False)
    return model


def _merged(model: Any, adapter: Adapter) -> Any:
    import torch
    from peft import PeftModel

    library: Any = PeftModel
    with torch.random.fork_rng(devices=[]):  # peft draws random numbers for weights that it then replaces
        wrapped = library.from_pretrained(model, str(adapter.folder), is_trainable=False, torch_device="cpu")
    unused = [layer for layer in _matrices(adapter) if not hasattr(wrapped.get_submodule(PREFIX + layer), "lora_A")]
    if unused:
        raise ValueError(f"its config does not list {unused[0]}, for which it has weights")
    return wrapped.merge_and_unload(safe_merge=True)


def _check_base(model: Any, adapter: Adapter, name: str) -> None:
    """Refuse an adapter whose matrices do not fit the layers of `model`."""
    layers = dict(model.named_modules())
    trained_on = f" (it was trained on {adapter.base})" if adapter.base else ""
    advice = f"give its base model to --model, or {OTHER_ADAPTER}"
    found = _matrices(adapter)
    if not found:
        raise UnsupportedModelError(f"The adapter {adapter.folder} contains no LoRA matrices; {OTHER_ADAPTER}")
    for layer, (down, up) in found.items():
        weight = getattr(layers.get(layer), "weight", None)
        if weight is None:
            raise UnsupportedModelError(
                f"The adapter {adapter.folder}{trained_on} changes {layer}, which {name} does not have; {advice}"
            )
        own, its = tuple(weight.shape), _shape(down, up)
        if sorted(own) != sorted(its):
            raise UnsupportedModelError(
                f"The adapter {adapter.folder}{trained_on} changes {layer} with {its[0]} x {its[1]} weights, and "
                f"{name} has {' x '.join(map(str, own))} there; {advice}"
            )
        if shared := next((other for other in _sharing(layers, weight) if other != layer), ""):
            raise UnsupportedModelError(
                f"The adapter {adapter.folder} changes {layer}, whose weights {name} shares with {shared}, so they "
                f"cannot be merged; {OTHER_ADAPTER}"
            )


def _sharing(layers: dict[str, Any], weight: Any) -> Iterator[str]:
    return (name for name, layer in layers.items() if getattr(layer, "weight", None) is weight)


def _matrices(adapter: Adapter) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes of A and B by the name of their layer.

    Raises:
        UnsupportedModelError: One of a pair is missing.
    """
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, shape in _named_shapes(adapter.folder / WEIGHTS):
        if found := _MATRIX.fullmatch(tensor.removeprefix(PREFIX)):
            parts.setdefault(found["layer"], {})[found["part"]] = shape
    for layer, pair in parts.items():
        if len(pair) < 2 or any(len(shape) != 2 for shape in pair.values()):
            raise UnsupportedModelError(f"The adapter {adapter.folder} lacks a matrix for {layer}; fetch it again")
    return {layer: (pair["A"], pair["B"]) for layer, pair in parts.items()}


def _named_shapes(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return [(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118 - not a dict


def _shape(down: tuple[int, ...], up: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of B A: of linear layers A is (rank, in) and B (out, rank), of embeddings as well."""
    return up[0], down[1]
