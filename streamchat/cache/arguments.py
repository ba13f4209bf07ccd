"""Reading what a causal LM's forward is called with. The one place that knows how arguments are spelled."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

# transformers renamed the argument over time; the last one is what some attention modules still say
CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def parameter_names(model: nn.Module) -> list[str]:
    """The parameters of the model's forward, in order (families differ)."""
    return list(inspect.signature(model.forward).parameters)


def cache_keyword(model: nn.Module) -> str:
    """How this model's forward calls its cache."""
    names = parameter_names(model)
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[1])


def by_keyword(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache of a call under whatever name; None without one."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def given_tokens(kwargs: dict[str, Any]) -> Tensor:
    """The input of a call: ids (batch, n) or embeddings (batch, n, hidden)."""
    ids = kwargs.get("input_ids")
    found = ids if ids is not None else kwargs.get("inputs_embeds")
    if not isinstance(found, Tensor):
        raise ValueError("the model was called with neither input_ids nor inputs_embeds")
    return found
