"""Finds the transformers causal LM inside wrappers such as PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from streamchat.base.errors import UnsupportedModelError


def causal_lm(model: Any) -> Any:
    """Return the causal LM: `model` itself, or the one inside PEFT, `torch.compile`, DataParallel and so on.

    Adapters inside the model's layers (LoRA) stay active: its forward runs through them.

    Raises:
        UnsupportedModelError: `model` contains no causal LM or several, or a wrapper adds to the text or copies it.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a model; give a transformers causal LM")
    found = _outermost_models(model)
    if len(found) != 1:
        what = "no transformers causal LM" if not found else f"{len(found)} transformers models"
        raise UnsupportedModelError(
            f"{type(model).__name__} contains {what}; give the causal LM itself, or a wrapper around one"
        )
    for module in model.modules():
        _refuse_wrapper(module)
    return found[0]


def refuse_training_mode(model: nn.Module) -> None:
    """Raise UnsupportedModelError if dropout is active: results would differ from forward to forward."""
    active = [
        name
        for name, module in model.named_modules()
        if module.training and (module is model or (isinstance(module, _DropoutNd) and module.p > 0))
    ]
    if active:
        where = f" (dropout in {active[0]})" if active[0] else ""
        raise UnsupportedModelError(f"{type(model).__name__} is in training mode{where}; call eval() on it first")


def _outermost_models(module: nn.Module) -> list[Any]:
    """Return the transformers causal LMs that are not inside another transformers model."""
    if isinstance(module, PreTrainedModel):
        return [module] if hasattr(module, "generate") else []
    return [model for child in module.children() for model in _outermost_models(child)]


def _refuse_wrapper(module: Any) -> None:
    """Raise UnsupportedModelError for wrappers that a single cache cannot serve."""
    copies = vars(module).get("device_ids")
    if isinstance(copies, list | tuple) and len(copies) > 1:
        raise UnsupportedModelError(
            f"{type(module).__name__} splits a batch over {len(copies)} copies of the model, which cannot share one "
            "cache; give the model inside it (its attribute `module`)"
        )
    configs = getattr(module, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"the adapter {name!r} ({type(config).__name__}) puts trained tokens before the text, which the cache "
                "would count and evict like text; use an adapter inside the model's layers (LoRA)"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"the adapter {name!r} is activated by tokens at certain positions (aLoRA), which eviction moves; use "
                "an adapter that is always active (LoRA)"
            )
