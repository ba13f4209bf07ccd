"""Weights that a model decodes with: native, int8 or int4.

On a CPU, quantized copies are kept in addition to the native weights, and cached on disk. On a GPU, they replace them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamchat.base import paths
from streamchat.base.atomic_files import read_json, save_result
from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.base.progress import Progress
from streamchat.config.settings import Decode
from streamchat.kernels.library import Kernels, load_kernels, why_unavailable
from streamchat.models import device as devices
from streamchat.models.fingerprint import FINGERPRINT_PREFIX, model_fingerprint
from streamchat.models.quantize.gpu import quantize_on_gpu
from streamchat.models.served import served_kinds
from streamchat.models.staging import ensure, read_manifest
from streamchat.quantization.quality import AUTO_LIMIT, divergence
from streamchat.quantization.replace import Choice, find_part, groups, layer_size, quantize_group, replace, restore
from streamchat.quantization.weights import Kind, QuantizedWeight

_log = logging.getLogger(__name__)

FORMAT = 3
"""Version of the quantized tensors; increment it when they change, so that older copies are quantized again."""
FILE = "packed.safetensors"
ALIGNMENT = 64
"""Bytes: PyTorch allocates tensors at multiples of it."""
SHARE = 0.6
"""Maximum size of the quantized weights relative to 16-bit weights."""


_copies: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()
"""Model -> folder with the quantized copy that it uses."""


def remove_copy(model: Any) -> None:
    """Remove the quantized copy of `model` from disk, because another one replaces it."""
    if folder := _copies.pop(model, None):
        shutil.rmtree(folder, ignore_errors=True)


def use_weights(
    model: Any,
    tokenizer: Any,
    asked: str,
    *,
    device: str,
    name: str,
    kernels: str,
    progress: Progress,
    decode: Decode = "auto",
) -> tuple[str, tuple[str, ...]]:
    """Quantize layers of `model` if requested, or if `auto` finds it safe and faster.

    Args:
        model: In eval mode on `device`; changed in place.
        tokenizer: For the text that the quality is measured on.
        asked: `auto`, `native`, `int8` or `int4`. On a CPU, auto chooses int4 for layers whose weights were quantized
            in such groups before, and int8 for others. It chooses native if the quality measured on this model is too
            low, without a kernel, or with too little memory. On other devices, auto is native.
        device: Device of the model.
        name: Name of the model, for messages.
        kernels: The setting: `auto` quantizes for compiled kernels if available, `torch` for PyTorch's.
        progress: Called with the stage; may raise to cancel.
        decode: The setting. On a GPU, `graph` and `plain` rule out tiles, which need the fused kernels.

    Returns:
        "native", "int8", "int4" or "int4 and int8", not counting the output layer; and notes for the user.

    Raises:
        ConfigError: int8 or int4 was requested and is not possible.
    """
    if asked == "native":
        return "native", ()
    if kinds := served_kinds(model):
        return kinds, ()
    one_gpu = device.startswith("cuda") and len({weight.device for weight in model.parameters()}) == 1
    if one_gpu and asked in ("int8", "int4"):
        chosen: Kind = "int8" if asked == "int8" else "int4"
        return chosen, quantize_on_gpu(model, tokenizer, chosen, name=name, progress=progress, decode=decode)
    reason = _obstacle(model, device, kernels)
    if reason:
        if asked != "auto":
            raise ConfigError(f"weights = {asked!r} cannot be used: {reason}; choose weights = native")
        _log.info("%s runs with native weights: %s", name, reason)
        return "native", ()
    choices: dict[str, Choice] = {"auto": "auto", "int8": "int8"}
    wanted = groups(model, choices.get(asked, "int4"))
    if not wanted:
        return "native", (f"{name} has no layer that can be quantized, so it runs with native weights",)
    kinds = _name_kinds(model, wanted)
    compiled = load_kernels(kernels)
    target = quantized_folder(model, kinds, compiled)
    if asked == "auto" and (_measured_divergence(target) or 0.0) > AUTO_LIMIT:
        return "native", ()
    quantized, notes = _load_or_quantize(model, wanted, compiled, target, name, progress)
    _copies[model] = target
    replace(model, quantized)
    if asked == "auto" and not _is_good_enough(model, tokenizer, target, name, progress):
        restore(model)
        return "native", notes
    return kinds, notes


def _name_kinds(model: Any, wanted: Mapping[tuple[str, ...], Kind]) -> str:
    """Return the kinds of all layers but the output layer, in words; that of the output layer if there is no other."""
    output = model.get_output_embeddings()
    kinds = {kind for group, kind in wanted.items() if find_part(model, group[0]) is not output}
    return " and ".join(sorted(kinds or set(wanted.values())))


def quantized_folder(model: Any, kinds: str, kernels: Kernels | None) -> Path:
    """Return the folder of this model's quantized copy, which depends on the weights, the kernels and the format."""
    layout = "compiled" if kernels is not None else [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    conditions = [model_fingerprint(model), kinds, FORMAT, layout]
    return paths.cache_path("weights", json.dumps(conditions), f"-{kinds.replace(' and ', '-')}")


def _obstacle(model: Any, device: str, kernels: str) -> str:
    """Return why quantized weights cannot be used; '' if they can."""
    if device != "cpu":
        return f"quantization supports a CPU or one CUDA GPU, and the model is on {device}"
    if load_kernels(kernels) is None and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"PyTorch's kernels need AVX2 or AVX-512, and there are no compiled kernels: {why_unavailable(kernels)}"
    if model.dtype not in (torch.bfloat16, torch.float32) and (
        load_kernels(kernels) is None or model.dtype != torch.float16
    ):
        return f"the kernels support bfloat16, and the model runs in {str(model.dtype).removeprefix('torch.')}"
    need, free = int(2 * SHARE * sum(p.numel() for p in model.parameters())), devices.free_memory("cpu")
    if free is not None and need > free:
        return "there is too little free memory for a second copy of the weights"
    return ""


def _load_or_quantize(
    model: Any,
    wanted: Mapping[tuple[str, ...], Kind],
    kernels: Kernels | None,
    target: Path,
    name: str,
    progress: Progress,
) -> tuple[dict[tuple[str, ...], QuantizedWeight], tuple[str, ...]]:
    """Return the quantized weights and notes: from disk if complete there, else quantized now and saved if possible."""
    kinds = _name_kinds(model, wanted)
    found = _read(model, wanted, kernels, target)
    if found is not None:
        return found, ()
    made: dict[tuple[str, ...], QuantizedWeight] = {}
    for done, (group, kind) in enumerate(wanted.items()):
        progress(f"Quantizing {name} to {kinds} (once)", done, len(wanted), "")
        made[group] = quantize_group(model, group, kind, kernels)
    shutil.rmtree(target, ignore_errors=True)  # damaged, else it would have been loaded

    def build(folder: Path) -> Mapping[str, Any]:
        tensors = {}
        for group, weight in made.items():
            tensors[f"{'+'.join(group)}:data"] = weight.data
            tensors[f"{'+'.join(group)}:scales"] = weight.scales
        save_file(tensors, folder / FILE)
        about = {"name": name, "weights": kinds, "digest": _digest(folder / FILE)}
        return about | {"format": FORMAT, "fingerprint": model_fingerprint(model)}

    need = sum(weight.nbytes for weight in made.values())
    try:
        ensure(target, build, what=f"{name} in {kinds}", progress=progress, need_bytes=need)
    except (ModelNotFoundError, SafetensorError, OSError) as error:
        return made, (f"Quantized weights could not be cached and will be rebuilt at every start: {error}",)
    _remove_unusable(target.parent)
    return made, ()


def _remove_unusable(folder: Path) -> None:
    """Remove copies of older versions, with another format or kind of fingerprint, which no model uses."""
    for kept in folder.iterdir():
        manifest = read_manifest(kept)
        if manifest is None:
            continue
        is_known = str(manifest.get("fingerprint", "")).startswith(FINGERPRINT_PREFIX)
        if not is_known or manifest.get("format") != FORMAT:
            shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):
                _quality_file(kept).unlink(missing_ok=True)


def _read(
    model: Any, wanted: Mapping[tuple[str, ...], Kind], kernels: Kernels | None, target: Path
) -> dict[tuple[str, ...], QuantizedWeight] | None:
    """Return the weights that `_load_or_quantize` saved in `target`; None if they are missing or damaged."""
    manifest = read_manifest(target)
    if manifest is None:
        return None
    try:
        if manifest["digest"] != _digest(target / FILE):
            raise ValueError("its contents changed")
        with safe_open(target / FILE, framework="pt") as file:

            def tensor(group: tuple[str, ...], part: str) -> Tensor:
                found = file.get_tensor(f"{'+'.join(group)}:{part}")
                assert isinstance(found, Tensor)
                # PyTorch's int8 kernel crashes if they are not aligned, and in the file they need not be
                return found if found.data_ptr() % ALIGNMENT == 0 else found.clone()

            return {
                group: QuantizedWeight(
                    kind,
                    tensor(group, "data"),
                    tensor(group, "scales"),
                    sum(layer_size(find_part(model, name))[0] for name in group),
                    kernels,
                )
                for group, kind in wanted.items()
            }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        _log.warning("the quantized weights in %s are damaged and will be rebuilt: %s", target, error)
        return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_good_enough(model: Any, tokenizer: Any, target: Path, name: str, progress: Progress) -> bool:
    """Return whether the quantized model predicts nearly the same as the native one; measured once and saved."""
    nats = _measured_divergence(target)
    if nats is None:
        progress(f"Measuring {name} with quantized weights (once)", 0, 0, "")
        nats = divergence(model, tokenizer)
        record = {"name": name, "divergence": nats, "limit": AUTO_LIMIT}
        save_result(_quality_file(target), record, "the measured quality")
    _log.info("%s with quantized weights: KL divergence %.5f nats/token", name, nats)
    return nats <= AUTO_LIMIT


def _quality_file(target: Path) -> Path:
    return target.with_suffix(".json")


def _measured_divergence(target: Path) -> float | None:
    """Return the divergence that `_is_good_enough` saved, in nats per token."""
    nats = read_json(_quality_file(target)).get("divergence")
    return nats if isinstance(nats, float) else None
