"""Finds the causal LM of transformers inside wrappers such as PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from streamchat.base.errors import UnsupportedModelError


def causal_lm(model: Any) -> Any:
    """Return the model that generates: `model` itself, or the one inside PEFT, `torch.compile`, DataParallel and so on.

    Adapters that live in the model's own layers (LoRA) stay active: its forward runs through them.

    Raises:
        UnsupportedModelError: There is none or more than one in it, or a wrapper adds to the text or copies the model.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a model; give a causal LM of transformers")
    found = _outermost_models(model)
    if len(found) != 1:
        what = "holds no causal LM" if not found else f"holds {len(found)} models"
        raise UnsupportedModelError(
            f"{type(model).__name__} {what} of transformers; give the causal LM itself, or a wrapper around one"
        )
    for module in model.modules():
        _refuse_wrapper(module)
    return found[0]


def refuse_training_mode(model: nn.Module) -> None:
    """Raise UnsupportedModelError when dropout is active: each forward would give other results."""
    active = [
        name
        for name, module in model.named_modules()
        if module.training and (module is model or (isinstance(module, _DropoutNd) and module.p > 0))
    ]
    if active:
        where = f" (dropout in {active[0]})" if active[0] else ""
        raise UnsupportedModelError(f"{type(model).__name__} is in training mode{where}; call eval() on it first")


def _outermost_models(module: nn.Module) -> list[Any]:
    """Return the causal LMs of transformers that no other model of transformers contains."""
    if isinstance(module, PreTrainedModel):
        return [module] if hasattr(module, "generate") else []
    return [model for child in module.children() for model in _outermost_models(child)]


def _refuse_wrapper(module: Any) -> None:
    """Refuse wrappers under which one cache cannot serve."""
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
                "would count and evict as text; adapters in the model's own layers (LoRA) can stream"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"the adapter {name!r} is activated by tokens at places of the text (aLoRA), which eviction moves; "
                "adapters that are always active (LoRA) can stream"
            )
