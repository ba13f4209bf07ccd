"""Which weights a model runs on: its own, or in int8 or int4.

On a CPU these are packed copies beside its own, made once and kept on the disk; on a GPU they take its place.
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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamchat.base import paths
from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.base.progress import Progress
from streamchat.kernels.library import kernels, why_unavailable
from streamchat.models import device as devices
from streamchat.models.fingerprint import KIND, model_fingerprint
from streamchat.models.quantize.gpu import quantise
from streamchat.models.staging import ensure, read_manifest
from streamchat.quantization.quality import AUTO_LIMIT, divergence, is_grouped
from streamchat.quantization.replace import groups, kind_of, quantize_group, replace, restore
from streamchat.quantization.weights import Kind, QuantizedWeight

_log = logging.getLogger(__name__)

FORMAT = 1
"""Counted up when the packed tensors or how they are made change; older copies are then made again."""
FILE = "packed.safetensors"
SHARE = 0.6
"""Most that packed weights take beside those of a 16-bit model."""


def use_weights(
    model: Any, tokenizer: Any, asked: str, *, device: str, name: str, progress: Progress
) -> tuple[str, tuple[str, ...]]:
    """Put packed layers into `model` where that is asked for, or safe and faster.

    Args:
        model: In eval mode on `device`; changed in place.
        tokenizer: For the text by which the quality is measured.
        asked: `auto`, `native`, `int8` or `int4`. On a CPU auto takes int4 for a model whose weights were in such
            groups before, int8 for others, and native where the quality measured on this very model is not good enough,
            where there is no kernel for it, or too little memory. On other devices it is native.
        device: Where the model is.
        name: Of the model, for messages.
        progress: Told what is going on; may raise to cancel.

    Returns:
        "native", "int8" or "int4", and what the user should know.

    Raises:
        ConfigError: int8 or int4 was asked for and cannot be had.
    """
    if asked == "native":
        return "native", ()
    one_gpu = device.startswith("cuda") and len({weight.device for weight in model.parameters()}) == 1
    if one_gpu and asked in ("int8", "int4"):
        chosen: Kind = "int8" if asked == "int8" else "int4"
        return chosen, quantise(model, tokenizer, chosen, name=name, progress=progress)
    reason = _obstacle(model, device)
    if reason:
        if asked != "auto":
            raise ConfigError(f"weights = {asked!r} cannot be used: {reason}; choose weights = native")
        _log.info("%s runs on its own weights: %s", name, reason)
        return "native", ()
    kind: Kind = "int8" if asked == "int8" or (asked == "auto" and not is_grouped(model)) else "int4"
    target = packed_folder(model, kind)
    if asked == "auto" and (_measured(target) or 0.0) > AUTO_LIMIT:
        return "native", ()
    packed, notes = _packed(model, kind, target, name, progress)
    if not packed:
        return "native", (f"{name} has no layer that {kind} weights could serve, so it runs on its own",)
    replace(model, packed)
    if asked == "auto" and not _good_enough(model, tokenizer, target, name, progress):
        restore(model)
        return "native", notes
    return kind, notes


def packed_folder(model: Any, kind: Kind) -> Path:
    """Where the packed copy of this model is or would be: it depends on the weights, the kernels and the format."""
    layout = "compiled" if kernels() is not None else [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    conditions = [model_fingerprint(model), kind, FORMAT, layout]
    digest = hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:32]
    return paths.cache_dir() / "weights" / f"{digest}-{kind}"


def _obstacle(model: Any, device: str) -> str:
    """Why packed weights cannot be used; '' where they can."""
    if device != "cpu":
        return f"their kernels are for a CPU or one GPU with CUDA, and the model is on {device}"
    if kernels() is None and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"PyTorch's kernels for them need AVX2 or AVX-512, and there are no compiled ones: {why_unavailable()}"
    if model.dtype not in (torch.bfloat16, torch.float32):
        return f"their kernels take bfloat16 and the model runs in {str(model.dtype).removeprefix('torch.')}"
    need, free = int(2 * SHARE * sum(p.numel() for p in model.parameters())), devices.free_memory("cpu")
    if free is not None and need > free:
        return "there is too little free memory for a second copy of the weights"
    return ""


def _packed(
    model: Any, kind: Kind, target: Path, name: str, progress: Progress
) -> tuple[dict[tuple[str, ...], QuantizedWeight], tuple[str, ...]]:
    """The packed weights, from the disk where they are whole there; made, and kept there where that works."""
    wanted = groups(model, kind)
    found = _read(model, kind, target, wanted)
    if found is not None or not wanted:
        return found or {}, ()
    made: dict[tuple[str, ...], QuantizedWeight] = {}
    for done, group in enumerate(wanted):
        progress(f"Packing {name} in {kind} (once)", done, len(wanted), "")
        made[group] = quantize_group(model, group, kind)
    shutil.rmtree(target, ignore_errors=True)  # damaged, or it would have been read

    def build(folder: Path) -> Mapping[str, Any]:
        tensors = {}
        for group, weight in made.items():
            tensors[f"{'+'.join(group)}:data"] = weight.data
            tensors[f"{'+'.join(group)}:scales"] = weight.scales
        save_file(tensors, folder / FILE)
        about = {"name": name, "weights": kind, "digest": _digest(folder / FILE)}
        return about | {"fingerprint": model_fingerprint(model)}

    need = sum(weight.nbytes for weight in made.values())
    try:
        ensure(target, build, what=f"{name} in {kind}", progress=progress, need_bytes=need)
    except (ModelNotFoundError, SafetensorError, OSError) as error:
        return made, (f"The packed weights are made anew at each start: {error}",)
    _remove_unusable(target.parent)
    return made, ()


def _remove_unusable(folder: Path) -> None:
    """Remove copies whose fingerprint is of an older kind: nothing finds them any more."""
    for kept in folder.iterdir():
        manifest = read_manifest(kept)
        if manifest is not None and not str(manifest.get("fingerprint", "")).startswith(KIND):
            shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):
                _verdict(kept).unlink(missing_ok=True)


def _read(
    model: Any, kind: Kind, target: Path, wanted: list[tuple[str, ...]]
) -> dict[tuple[str, ...], QuantizedWeight] | None:
    """What `_packed` kept in `target`; None where it is not there or damaged."""
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
                return found

            return {
                group: QuantizedWeight(kind_of(model, group, kind), tensor(group, "data"), tensor(group, "scales"))
                for group in wanted
            }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        _log.warning("the packed weights in %s are damaged and made again: %s", target, error)
        return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _good_enough(model: Any, tokenizer: Any, target: Path, name: str, progress: Progress) -> bool:
    """Whether the packed model says nearly the same as the plain one; measured once and kept."""
    nats = _measured(target)
    if nats is None:
        progress(f"Measuring {name} with packed weights (once)", 0, 0, "")
        nats = divergence(model, tokenizer)
        try:
            _verdict(target).write_text(
                json.dumps({"name": name, "divergence": nats, "limit": AUTO_LIMIT}), encoding="utf-8"
            )
        except OSError as error:
            _log.warning("the measured quality could not be kept: %s", error)
    _log.info("%s with packed weights: %.5f nats a token from its own", name, nats)
    return nats <= AUTO_LIMIT


def _verdict(target: Path) -> Path:
    return target.with_suffix(".json")


def _measured(target: Path) -> float | None:
    """What `_good_enough` measured before."""
    try:
        return float(json.loads(_verdict(target).read_text(encoding="utf-8"))["divergence"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
