"""Builds and fills a model on the CPU without `from_pretrained`, for folders that hold exactly its weights.

`from_pretrained` builds a model on the meta device. torch computes some operations there by Python functions, and the
first call of one imports its compiler (torch._dynamo) and sympy, 0.5 s. On the CPU, weights
that are not initialized take no physical memory, and constants such as rotary frequencies are computed at once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto

_log = logging.getLogger(__name__)


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Return the causal LM of `config` on the CPU; its weights are not initialized and not tied.

    Raises:
        KeyError: transformers has no causal LM for `config`.
        ValueError: The model does not support this implementation of attention.
    """
    library: Any = modeling_auto
    kind = library.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    functions: Any = initialization
    with functions.no_init_weights():
        model: PreTrainedModel = kind._from_config(config, dtype=dtype, attn_implementation=attention)
    return model


def read_exactly(
    folder: Path, files: list[Path], config: PreTrainedConfig, dtype: torch.dtype, attention: str
) -> PreTrainedModel | None:
    """Return the model in `folder`, on the CPU; None if it needs `from_pretrained`.

    It does if weights must be converted or are missing, or if reading fails: `from_pretrained` then says why.

    Args:
        folder: The model folder; `generation_config.json` is optional.
        files: Its safetensors files.
        config: Its configuration.
        dtype: Of the weights.
        attention: Implementation, such as `sdpa`.
    """
    try:
        return _read_exactly(folder, files, config, dtype, attention)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        _log.info("%s needs from_pretrained", folder, exc_info=True)
        return None


def _read_exactly(
    folder: Path, files: list[Path], config: PreTrainedConfig, dtype: torch.dtype, attention: str
) -> PreTrainedModel | None:
    if getattr(config, "quantization_config", None) is not None or any(folder.glob("adapter_*")):
        return None
    model = build_skeleton(config, dtype, attention)
    library: Any = model
    renamings: Any = get_model_conversion_mapping(library)
    if not all(isinstance(each, WeightRenaming) for each in renamings):
        return None  # it computes weights from those in the files, perhaps under the same names
    if library._get_dtype_plan(dtype):
        return None  # some weights need another dtype
    own = model.state_dict()

    def own_name(name: str) -> str:
        return str(rename_source_key(name, renamings, [], model.base_model_prefix, own)[0])

    tensors = {own_name(name): tensor for file in files for name, tensor in _read(file).items()}
    tied = set(library.all_tied_weights_keys)
    shapes = {name: own[name].shape for name in tensors if name in own}
    if any(shapes.get(name) != tensor.shape for name, tensor in tensors.items()) or own.keys() - tensors.keys() - tied:
        return None
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False, assign=True)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        library.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model


def _read(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
