"""Stores a copy of a model that needs no native weights: its quantized layers as tiles, all other tensors unchanged.

The model must run on compiled kernels as a whole, and the loss of quality of its quantized layers must have been
accepted. The copy replaces the stored quantized weights of `cpu`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from streamchat.base import paths
from streamchat.base.errors import ModelNotFoundError
from streamchat.base.progress import Progress
from streamchat.decode.install import is_compiled, tokens_at_once
from streamchat.decode.native_step import QUANTIZED_TOKENS
from streamchat.kernels.library import load_kernels
from streamchat.models.contents import file_digest
from streamchat.models.fingerprint import model_fingerprint
from streamchat.models.folder import TILES
from streamchat.models.plan import LoadPlan
from streamchat.models.quantize.cpu import FORMAT, remove_copy
from streamchat.models.staging import ensure, read_manifest
from streamchat.models.tile_file import StoredMatrix, TileWriter
from streamchat.quantization.experts import quantized_experts
from streamchat.quantization.linear import QuantizedConv1D, quantized_layers

_log = logging.getLogger(__name__)


def served_folder(plan: LoadPlan, digest: str, asked: str) -> Path:
    """Return the folder of the copy, which may not exist.

    Args:
        plan: How the model is loaded.
        digest: Digest of the files with its weights.
        asked: The `weights` setting.
    """
    conditions = [digest, plan.contents.config, plan.dtype, asked, FORMAT, transformers.__version__]
    return paths.cache_path("weights", json.dumps(conditions, sort_keys=True), f"-{asked}-served")


def is_complete(folder: Path, name: str, progress: Progress) -> bool:
    """Return whether the copy exists and is intact; delete a damaged one."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    whole = bool(manifest.get("digest") == file_digest(folder / TILES, name=name, progress=progress))
    if not whole:
        _log.warning("the quantized weights in %s are damaged and will be rebuilt", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return whole


def with_copy(plan: LoadPlan, folder: Path, kernels: str, progress: Progress) -> LoadPlan:
    """Return the plan that serves the copy in `folder`; `plan` itself if there is none, or no kernels."""
    compiled = load_kernels(kernels)
    if compiled is None or not is_complete(folder, plan.name, progress):
        return plan
    return replace(plan, kernels=compiled, tiles=folder, merged=True)


def can_be_served(model: Any) -> bool:
    """Return whether the compiled kernels run the whole model on quantized weights, also for prompts.

    Not for mixtures of experts: the copy would have no codes of the experts.
    """
    runs_whole = is_compiled(model) and tokens_at_once(model) >= QUANTIZED_TOKENS
    return runs_whole and not quantized_experts(model)


def make_served_copy(model: Any, folder: Path, name: str, progress: Progress) -> bool:
    """Write the copy of a model that `can_be_served`; return whether this succeeded."""

    def build(target: Path) -> Mapping[str, Any]:
        _write(model, target)
        model.config.save_pretrained(str(target))
        if model.generation_config is not None:
            model.generation_config.save_pretrained(str(target))
        digest = file_digest(target / TILES, name=name, progress=progress)
        return {"name": name, "digest": digest, "format": FORMAT, "fingerprint": model_fingerprint(model)}

    try:
        ensure(folder, build, what=name, progress=progress)
    except (ModelNotFoundError, SafetensorError, OSError, KeyError, ValueError) as error:
        _log.warning("%s keeps its native weights in memory: %s", name, error)
        return False
    remove_copy(model)
    return True


def _write(model: Any, folder: Path) -> None:
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(model).items()}
    tensors = model.state_dict()
    with TileWriter(folder / TILES, len(tensors)) as file:
        for name, tensor in tensors.items():
            layer = layers.get(name)
            if layer is not None:
                made = layer.quantized
                is_transposed = isinstance(layer, QuantizedConv1D)
                file.add(name, made.data, StoredMatrix(made.layout, made.rows, made.columns, is_transposed))
            elif name not in model.all_tied_weights_keys:
                file.add(name, tensor)
