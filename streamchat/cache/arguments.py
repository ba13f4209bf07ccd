"""Reads the arguments of a causal LM's forward. The only place that knows their names."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

# transformers renamed the argument over time; some attention modules still use the last one
CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def parameter_names(model: nn.Module) -> list[str]:
    """Return the parameter names of the model's forward, in order (families differ)."""
    return list(inspect.signature(model.forward).parameters)


def cache_keyword(model: nn.Module) -> str:
    """Return the name of the cache parameter of this model's forward."""
    names = parameter_names(model)
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[1])


def by_keyword(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def given_cache(kwargs: dict[str, Any]) -> Any:
    """Return the cache argument of a call, under any of its names; None without one."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def given_tokens(kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a call: ids (batch, n) or embeddings (batch, n, hidden).

    Raises:
        ValueError: The call has neither.
    """
    ids = kwargs.get("input_ids")
    tokens = ids if ids is not None else kwargs.get("inputs_embeds")
    if not isinstance(tokens, Tensor):
        raise ValueError("the model was called with neither input_ids nor inputs_embeds")
    return tokens
