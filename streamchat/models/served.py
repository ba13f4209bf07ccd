"""Builds models from tiles: served as they are by the compiled kernels, or dequantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from streamchat.kernels.library import Kernels
from streamchat.models.folder import TILES
from streamchat.models.light.skeleton import build_skeleton
from streamchat.models.tile_file import StoredMatrix, read_tiles
from streamchat.quantization.linear import QuantizedConv1D, QuantizedLinear, is_linear
from streamchat.quantization.matrix import QuantizedMatrix
from streamchat.quantization.weights import QuantizedWeight


def build_served(
    folder: Path, dtype: torch.dtype, attention: str, kernels: Kernels | None
) -> tuple[Any, dict[str, Any]] | None:
    """Return the model of `folder` with its tiles as weights, and transformers' loading information.

    Tensors are mapped from the file; only those that are not tiles and have another dtype than `dtype` are copied into
    memory. Returns None if some weights of the model need another dtype than the others.

    Raises:
        ValueError, ImportError: The model has no such attention.
    """
    model: Any = build_skeleton(_config(folder), dtype, attention)
    if model._get_dtype_plan(dtype):
        return None
    tensors, coded = read_tiles(folder / TILES)
    own = model.state_dict()
    found = {name: _weight(tensors[name], coded.get(name), dtype, kernels) for name in tensors if name in own}
    wrong = [name for name, tensor in found.items() if tensor.shape != own[name].shape]
    missing = [name for name in own if name not in found and name not in model.all_tied_weights_keys]
    if not wrong and not missing:
        tied = model.all_tied_weights_keys
        for name, tensor in found.items():
            if name not in tied:
                _assign(model, name, tensor)
        model.tie_weights()
        _use_tiles(model, {name: tensor for name, tensor in found.items() if name in tied})
        model.register_state_dict_post_hook(dequantize_state)
        _set_generation_config(model, folder)
    return model, {"missing_keys": missing, "mismatched_keys": wrong}


def build_native(
    folder: Path, dtype: torch.dtype, attention: str, arguments: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the model of `folder` with dequantized weights, and transformers' loading information.

    Args:
        folder: Has tiles.
        dtype: Of the weights.
        attention: Its implementation.
        arguments: More arguments for `from_pretrained`.

    Raises:
        ValueError, ImportError: The model has no such attention.
    """
    config = _config(folder)
    library: Any = AutoModelForCausalLM
    kind = library._model_mapping[type(config)]
    tensors, coded = read_tiles(folder / TILES)
    weights = {name: _native(tensor, coded.get(name), dtype) for name, tensor in tensors.items()}
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        **arguments,
    )
    _set_generation_config(model, folder)
    return model, info


def served_kinds(model: Any) -> str:
    """Return the precisions of the layers of `model` that are tiles, such as 'int4 and int8'; '' if there are none.

    The output layer counts only if there is no other.
    """
    output = model.get_output_embeddings()
    layers = [each for each in model.modules() if isinstance(getattr(each, "weight", None), QuantizedMatrix)]
    inner = [each for each in layers if each is not output and not isinstance(each, nn.Embedding)]
    return " and ".join(sorted({each.weight.quantized.kind for each in inner or layers}))


def _config(folder: Path) -> Any:
    library: Any = AutoConfig
    return library.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _weight(tensor: Tensor, coded: StoredMatrix | None, dtype: torch.dtype, kernels: Kernels | None) -> Tensor:
    if coded is None:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    return QuantizedMatrix(quantized(tensor, coded, kernels), dtype, coded.transposed)


def _native(tensor: Tensor, coded: StoredMatrix | None, dtype: torch.dtype) -> Tensor:
    found = _weight(tensor, coded, dtype, None)
    return found.whole().contiguous() if isinstance(found, QuantizedMatrix) else found


def quantized(tiles: Tensor, coded: StoredMatrix, kernels: Kernels | None) -> QuantizedWeight:
    """Return the quantized matrix that `coded` describes."""
    layout: Any = coded.layout
    return QuantizedWeight(layout, tiles, torch.empty(0, dtype=torch.bfloat16), coded.rows, kernels)


def _assign(model: Any, name: str, tensor: Tensor) -> None:
    owner, _, part = name.rpartition(".")
    module = model.get_submodule(owner)
    if part in module._buffers:
        module._buffers[part] = tensor
    else:
        module._parameters[part] = nn.Parameter(tensor, requires_grad=False)


def _use_tiles(model: Any, copies: Mapping[str, Tensor]) -> None:
    """Replace the linear layers that have tiles, so that decode steps find them.

    Args:
        model: Its weights are loaded and tied.
        copies: Tiles of weights that are tied to a native embedding.
    """
    for name, layer in list(model.named_modules()):
        weight = copies.get(f"{name}.weight", getattr(layer, "weight", None))
        if not isinstance(weight, QuantizedMatrix) or isinstance(layer, nn.Embedding):
            continue
        if weight.transposed is not (type(layer) is Conv1D):
            raise ValueError(f"the tiles of {name} are those of another kind of layer")
        if type(layer) is Conv1D:
            model.set_submodule(name, QuantizedConv1D(layer, weight.quantized))
        elif is_linear(layer):
            linear: Any = layer
            model.set_submodule(name, QuantizedLinear(linear, weight.quantized))


def dequantize_state(model: Any, state: dict[str, Any], *_: Any) -> None:
    """Replace codes in the state of a model, so that it can be saved; tied weights stay one tensor."""
    plain: dict[int, Tensor] = {}
    for name, weight in state.items():
        if isinstance(weight, QuantizedMatrix):
            key = id(weight.quantized)
            if key not in plain:
                plain[key] = weight.whole().contiguous()
            state[name] = plain[key]


def _set_generation_config(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
