"""int8 and int4 weights on a GPU as tiles, which the fused kernels multiply; they replace the native weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from streamchat.base.progress import Progress
from streamchat.cache.token_ids import input_device
from streamchat.config.settings import Decode
from streamchat.decode.fused.step import why_no_tiles
from streamchat.models.served import dequantize_state
from streamchat.quantization.experts import is_experts
from streamchat.quantization.matrix import QuantizedMatrix
from streamchat.quantization.replace import groups, quantize_group, replace
from streamchat.quantization.weights import Kind

_log = logging.getLogger(__name__)

Group = tuple[str, ...]


def why_not_tiles(model: Any, kind: Kind, decode: Decode) -> str:
    """Return why the fused kernels would not decode for `model` with `kind` weights in tiles; '' if they would.

    Args:
        model: With native weights, on its device.
        kind: The precision.
        decode: The setting.
    """
    if decode not in ("auto", "fused"):
        return f"decode = {decode}"
    kinds = {id(model.get_submodule(name)): each for group, each in _wanted(model, kind).items() for name in group}
    return why_no_tiles(model, input_device(model), kinds)


def quantize_to_tiles(model: Any, kind: Kind, name: str, progress: Progress) -> None:
    """Quantize the linear layers of `model` on its device, and free their native weights, layer by layer.

    The layers are those that a CPU quantizes, in the same layout: siblings as one matrix, and the output layer in int8.
    An output layer that shares its weight with the embedding gets tiles of its own; the embedding stays native.

    Args:
        model: In eval mode; changed in place. `why_not_tiles` found no reason.
        kind: The precision of all layers but the output layer.
        name: Name of the model, for messages.
        progress: Called with the stage; may raise to cancel, which leaves the model unusable.
    """
    wanted, shared = _wanted(model, kind), _shared(model)
    for done, (group, each) in enumerate(wanted.items()):
        progress(f"Quantizing {name} to {kind}", done, len(wanted), "")
        layers: list[Any] = [model.get_submodule(part) for part in group]
        replace(model, {group: quantize_group(model, group, each, None, tiled=True)})
        for part, plain in zip(group, layers, strict=True):
            layer: Any = model.get_submodule(part)
            if id(plain.weight) not in shared:
                dtype, is_transposed = plain.weight.dtype, isinstance(plain, Conv1D)
                matrix: Any = QuantizedMatrix(layer.quantized, dtype, is_transposed)
                # the dictionary of parameters is also that of the new layer, so this was the last reference
                plain.weight = nn.Parameter(matrix, requires_grad=False)
    model.register_state_dict_post_hook(dequantize_state)
    _log.info("%s has %s weights in tiles, for the fused kernels", name, kind)


def _wanted(model: Any, kind: Kind) -> Mapping[Group, Kind]:
    """Return the groups of layers to quantize; none of experts, which the fused kernels do not compute."""
    if any(is_experts(module) for module in model.modules()):
        return {}
    return groups(model, kind)


def _shared(model: nn.Module) -> set[int]:
    """Return the `id` of each parameter that several modules share."""
    found = Counter(id(each) for module in model.modules() for each in module._parameters.values() if each is not None)
    return {each for each, count in found.items() if count > 1}
