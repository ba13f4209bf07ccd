"""A step of fused kernels, for `streamchat.decode.cuda_graph`: bound to buffers, captured, replayed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.layers.codes import CacheDtype
from streamchat.decode.families.registry import model_spec
from streamchat.decode.fused.sizes import MULTIPROCESSORS, Sizes
from streamchat.decode.fused.weights import can_read, can_read_tiles, is_plain
from streamchat.decode.operations import Product, lower
from streamchat.decode.spec import AttentionSpec, BlockSpec, ExpertsSpec, ModelSpec
from streamchat.decode.static import Inputs, changes_with_length
from streamchat.decode.static_slots import Buffers
from streamchat.quantization.weights import Kind

MAX_HEAD_DIM = 256
LEAST_CAPABILITY = (8, 0)
"""Compute capability from which GPUs have bfloat16 arithmetic."""

INCOMPLETE = "they do not compute every part of this model"
"""Why a model has no fused step."""


def is_interpreted() -> bool:
    """Return whether Triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(device: torch.device) -> str:
    """Return why fused kernels cannot run on `device`; '' if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if is_interpreted():
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"they are for CUDA, not for {'ROCm' if device.type == 'cuda' else device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; they need 8.0"
    return ""


def supports(model: ModelSpec) -> bool:
    """Return whether the fused kernels compute every part of `model`."""
    table: Any = model.embedding.weight
    if not is_plain(table) or table.stride(-1) != 1:
        return False
    if (model.logit_scale != 1 and model.head.bias is not None) or not all(map(_supports, model.blocks)):
        return False
    return all(can_read(each.layers, each.gated, model.dtype) for each in _products(model))


def _products(model: ModelSpec) -> list[Product]:
    return [each for each in lower(model) if isinstance(each, Product)]


def _supports(block: BlockSpec) -> bool:
    of = block.attention
    if isinstance(block.mlp, ExpertsSpec) or of.num_heads % of.num_kv_heads or of.head_dim > MAX_HEAD_DIM:
        return False
    if not _can_norm(of):
        return False
    return not (block.parallel and (block.attention_out_norm or block.mlp_out_norm))


def _can_norm(of: AttentionSpec) -> bool:
    """Return whether queries and keys have the same kind of norm, which does not need clipped values of all heads."""
    whole = {norm.whole for norm in (of.q_norm, of.k_norm) if norm is not None}
    return len(whole) <= 1 and not (whole == {True} and of.clip is not None)


class FusedStep:
    """The step of a model for one token, in Triton kernels; `bind` makes a run of it.

    Args:
        model: `supports(model)`.
        device: Where the model is.
        sizes: How the work is divided; None for the defaults of the device.
    """

    def __init__(self, model: ModelSpec, device: torch.device, sizes: Sizes | None = None) -> None:
        self._model, self._device = model, device
        self._sizes = sizes or sizes_of(device)
        self._program: Any = None

    @property
    def program(self) -> Any:
        """The launches; made at first use, which imports Triton."""
        if self._program is None:
            from streamchat.decode.fused.program import FusedProgram

            operand = torch.float32 if is_interpreted() else None
            with torch.inference_mode(False), torch.no_grad():
                self._program = FusedProgram(self._model, self._sizes, operand)
        return self._program

    def compile(self, dtype: CacheDtype | None = None) -> None:
        """Compile the kernels for caches in `dtype`, or find them in Triton's cache; None for the model's dtype."""
        with self._on_device(), torch.inference_mode(False), torch.no_grad():
            self.program.compile(dtype)

    def run(self, inputs: Inputs, buffers: Sequence[Buffers]) -> Tensor:
        """Compute one token: write a slot of each of `buffers`, return (1, 1, vocabulary) float32 logits."""
        with self._on_device():
            logits: Tensor = self.program.run(inputs, buffers)
        return logits

    def _on_device(self) -> AbstractContextManager[Any]:
        """Context manager: kernels are launched on the current device, which need not be that of the model."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()


def bind_fused(step: Any, inputs: Inputs, buffers: Sequence[Buffers], _: torch.dtype) -> Callable[[], Tensor]:
    """Bind a `FusedStep`; see `streamchat.decode.static.bind`."""

    def run() -> Tensor:
        logits: Tensor = step.run(inputs, buffers)
        return logits

    return run


def fused_step(model: Any, device: torch.device) -> FusedStep | None:
    """Return the fused step of `model`; None if the kernels do not support it."""
    spec = None if changes_with_length(model) else model_spec(model)
    return None if spec is None or not supports(spec) else FusedStep(spec, device)


def why_no_tiles(model: Any, device: torch.device, kinds: Mapping[int, Kind]) -> str:
    """Return why the fused kernels could not decode for `model` with quantized layers; '' if they could.

    Args:
        model: A model with native weights.
        device: Where it is.
        kinds: The `id` of each layer to quantize -> how.
    """
    if reason := unavailable(device):
        return reason
    spec = None if changes_with_length(model) else model_spec(model)
    if spec is None or not supports(spec):
        return INCOMPLETE
    reads_all = all(
        can_read_tiles(each.layers, each.gated, [kinds.get(id(layer)) for layer in each.layers])
        for each in _products(spec)
    )
    return "" if reads_all else INCOMPLETE


def sizes_of(device: torch.device) -> Sizes:
    """Return the block sizes for a device; larger ones for the interpreter, which pays for each program."""
    if device.type != "cuda":
        return Sizes(multiprocessors=1, max_rows=64, tile=1 << 16, max_splits=4, attention_block=16, least_slots=16)
    properties = torch.cuda.get_device_properties(device)
    return Sizes.of((properties.major, properties.minor), properties.multi_processor_count)


def sizes_for(capability: tuple[int, int]) -> Sizes:
    """Return the block sizes for a compute capability, without a device."""
    return Sizes.of(capability, MULTIPROCESSORS.get(capability, MULTIPROCESSORS[9, 0]))
