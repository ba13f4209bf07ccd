"""Reads tokenizer and weights of a model folder with transformers, and refuses what is not a causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from streamchat.base.devices import is_spread
from streamchat.base.errors import ModelNotFoundError, StreamchatError, UnsupportedModelError, raise_limit, short
from streamchat.base.out_of_memory import is_out_of_memory
from streamchat.base.progress import Progress, silent
from streamchat.base.sanitize import encodable
from streamchat.models.adapters import merge
from streamchat.models.folder import weight_files
from streamchat.models.gguf.tokenizer import read_saved
from streamchat.models.light.skeleton import read_exactly
from streamchat.models.limits import too_large
from streamchat.models.plan import LoadPlan
from streamchat.models.spread import spread_arguments
from streamchat.models.staging import read_manifest


def check_config(plan: LoadPlan) -> None:
    """Refuse what transformers cannot load as a causal language model, with the reason."""
    kind = str(plan.contents.config.get("model_type") or "")
    library: Any = modeling_auto
    configs: Any = transformers.CONFIG_MAPPING
    if kind not in configs:
        if plan.contents.config.get("auto_map"):
            raise UnsupportedModelError(
                f"{plan.name} ({kind or 'no model_type'}) requires trust_remote_code, which streamchat does not "
                "allow; choose a model that transformers supports itself"
            )
        raise UnsupportedModelError(
            f"{plan.name} is of type {kind!r}, which transformers {transformers.__version__} does not support; "
            "choose another model"
        )
    if kind not in library.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{plan.name} is of type {kind!r}, which is not a causal language model; choose one that is"
        )


def read_tokenizer(plan: LoadPlan) -> PreTrainedTokenizerBase:
    """Return the tokenizer.

    Raises:
        ModelNotFoundError: It cannot be read.
    """
    if encodable(str(plan.folder)) != str(plan.folder):
        raise ModelNotFoundError(
            f"the path {plan.folder} is not valid UTF-8, which the libraries that read models need; rename the folder, "
            "or set STREAMCHAT_HOME to another one"
        )
    library: Any = AutoTokenizer
    try:
        if "converter" in (read_manifest(plan.folder) or {}):
            return read_saved(plan.folder)
        tokenizer: PreTrainedTokenizerBase = library.from_pretrained(
            str(plan.folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise_limit(error)
        raise ModelNotFoundError(
            f"The tokenizer of {plan.name} in {plan.folder} cannot be read ({short(error)}); fetch the model again"
        ) from error
    return tokenizer


def read_model(plan: LoadPlan, progress: Progress = silent) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model in eval mode on the device of `plan`, with its adapters merged, and notes for the user.

    Raises:
        ModelNotFoundError: It does not fit into memory.
        UnsupportedModelError: It cannot be loaded as a causal language model, or lacks weights.
    """
    library: Any = AutoModelForCausalLM
    notes: tuple[str, ...] = ()
    spread = spread_arguments(plan.device) if is_spread(plan.device) else {}

    def read(how: str) -> tuple[Any, dict[str, Any]]:
        if plan.tiles is not None:
            return _read_tiles(plan, plan.tiles, how, spread)
        if plan.device == "cpu" and (exact := _read_exactly(plan, how)) is not None:
            return exact, {}
        result: tuple[Any, dict[str, Any]] = library.from_pretrained(
            str(plan.folder),
            dtype=getattr(torch, plan.dtype),
            attn_implementation=how,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **spread,
        )
        return result

    try:
        try:
            model, info = read(plan.attention)
        except (ValueError, ImportError) as error:
            if plan.attention == "eager" or "scaled_dot_product_attention" not in str(error):
                raise
            model, info = read("eager")
            notes = (f"{plan.name} has no {plan.attention} attention, so it runs with eager attention",)
        _check_complete(info, plan)
        if plan.to_merge:
            model = merge(model, plan.to_merge, plan.source.name, progress)
        if not spread:
            model = model.to(plan.device)
    except StreamchatError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise too_large(plan.name, plan.device, plan.dtype) from error
        raise_limit(error)
        raise UnsupportedModelError(
            f"{plan.name} in {plan.folder} cannot be loaded as a causal language model ({short(error)}); choose "
            "another model"
        ) from error
    model.eval()
    model.requires_grad_(False)
    return model, notes


def _read_tiles(plan: LoadPlan, folder: Path, attention: str, spread: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from streamchat.models.served import build_native, build_served

    dtype = getattr(torch, plan.dtype)
    if plan.kernels is not None and (served := build_served(folder, dtype, attention, plan.kernels)) is not None:
        return served
    return build_native(folder, dtype, attention, spread)


def _read_exactly(plan: LoadPlan, attention: str) -> PreTrainedModel | None:
    library: Any = AutoConfig
    config = library.from_pretrained(str(plan.folder), local_files_only=True, trust_remote_code=False)
    return read_exactly(plan.folder, weight_files(plan.folder), config, getattr(torch, plan.dtype), attention)


def _check_complete(info: dict[str, Any], plan: LoadPlan) -> None:
    """Refuse a model with missing weights, which transformers would silently fill with random numbers."""
    for kind, words in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for")):
        if keys := sorted(str(key) for key in info.get(kind) or ()):
            raise UnsupportedModelError(
                f"{plan.name} {words} {len(keys)} of the weights of a causal language model ({keys[0]} is the "
                "first), so its output would be nonsense; choose a complete model"
            )
