"""Putting a decode step into a model: its forward takes it where it fits, and is what it was elsewhere."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from streamchat.cache.arguments import CACHE_NAMES, given_cache
from streamchat.cache.layer import StreamingLayer
from streamchat.cache.streaming import StreamingCache
from streamchat.speed.steps import decode_step

# Arguments that change nothing for one token; any other one that is given leads to the plain forward.
HARMLESS = {"input_ids", "position_ids", "use_cache", "logits_to_keep", "return_dict", *CACHE_NAMES}
_CACHE_FIELD = next(name for name in CACHE_NAMES if name in {f.name for f in fields(CausalLMOutputWithPast)})


def install(model: Any) -> bool:
    """Give `model` a short path for one new token on a `StreamingCache`; returns whether its family has one.

    Hooks on the model itself run as ever; those on its inner modules do not, for such a token.
    """
    step = decode_step(model)
    # layers on several devices need the hooks that move what they pass on; "meta" are weights kept elsewhere
    devices = {parameter.device for parameter in model.parameters()}
    if step is None or len(devices) > 1 or devices.pop().type != "cpu":
        return False
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = _fitting_cache(args, kwargs)
        if cache is None:
            return plain(*args, **kwargs)
        layers: Any = cache.layers
        logits = step(kwargs["input_ids"], kwargs["position_ids"], layers)
        cache.count_read(1)
        given: Any = {"logits": logits, _CACHE_FIELD: cache}
        return CausalLMOutputWithPast(**given)

    model.forward = forward
    return True


def uninstall(model: Any) -> None:
    """Take it out again."""
    model.__dict__.pop("forward", None)


def _fitting_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> StreamingCache | None:
    """The cache of a call that a step serves: one token, one row, no gradients."""
    ids, cache = kwargs.get("input_ids"), given_cache(kwargs)
    if args or not isinstance(ids, Tensor) or ids.shape != (1, 1) or not isinstance(kwargs.get("position_ids"), Tensor):
        return None
    if any(value is not None and name not in HARMLESS for name, value in kwargs.items()):
        return None
    if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False or torch.is_grad_enabled():
        return None
    # a mixed layer, or a cache that is filled anew, needs the whole forward
    plain = type(cache) is StreamingCache and all(type(layer) is StreamingLayer for layer in cache.layers)
    return cache if plain else None
