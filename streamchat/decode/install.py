"""Putting a decode step into a model: its forward takes it where it fits, and is what it was elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from streamchat.cache.arguments import CACHE_NAMES, given_cache
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.cuda_graph import CapturedStep, CudaGraphs, Graphs
from streamchat.decode.eager import Step, decode_step
from streamchat.decode.native_step import CompiledStep, compiles
from streamchat.decode.spec import describe
from streamchat.decode.static import static_step
from streamchat.kernels.library import kernels

# Arguments that change nothing, or that a step heeds; any other one that is given leads to the plain forward.
HARMLESS = {"input_ids", "position_ids", "use_cache", "logits_to_keep", "return_dict", *CACHE_NAMES}
_CACHE_FIELD = next(name for name in CACHE_NAMES if name in {f.name for f in fields(CausalLMOutputWithPast)})


def install(model: Any) -> bool:
    """Give `model` a short path for a new token, or a few, on a `StreamingCache`; returns whether there is one.

    On a CPU a shorter forward, on one CUDA device a captured one, and none on others. Hooks on the model itself run
    as ever; those on its inner modules do not, for such a token.
    """
    device = model.get_input_embeddings().weight.device
    spread = any(weights.device != device for weights in model.parameters())
    if spread or device.type not in ("cpu", "cuda"):
        return False
    return _install_short(model) if device.type == "cpu" else install_captured(model, CudaGraphs(device))


def _install_short(model: Any) -> bool:
    step = _cpu_step(model)
    if step is None:
        return False

    def serve(cache: StreamingCache, kwargs: dict[str, Any]) -> Any:
        layers: Any = cache.layers
        ids, keep = kwargs["input_ids"], kwargs.get("logits_to_keep") or 0
        if isinstance(step, CompiledStep):
            logits = step(ids, kwargs["position_ids"], layers, last_only=keep == 1)
        else:
            logits = step(ids, kwargs["position_ids"], layers)
        return _read(cache, logits[:, -keep:], ids.shape[1])

    _wrap(model, serve, step)
    return True


def _cpu_step(model: Any) -> Step | CompiledStep | None:
    """By compiled kernels where there are some and they serve all of the model; else by PyTorch's."""
    described = describe(model)
    if described is None:
        return None
    compiled = kernels()
    return CompiledStep(described, compiled) if compiled is not None and compiles(described) else decode_step(described)


def install_captured(model: Any, graphs: Graphs) -> bool:
    """Record the step of `model` by `graphs` when it decodes; returns whether it has one that can be recorded."""
    step = static_step(model)
    if step is None:
        return False
    captured = CapturedStep(step, model.get_input_embeddings().weight.device, model.dtype, graphs)
    plain = model.forward

    def serve(cache: StreamingCache, kwargs: dict[str, Any]) -> Any:
        layers: Any = cache.layers
        logits = captured(kwargs["input_ids"], kwargs["position_ids"], layers)
        if logits is not None:
            return _read(cache, logits)
        output = plain(**kwargs)
        output.logits = captured.settle(output.logits)
        return output

    _wrap(model, serve, captured)
    return True


def _wrap(model: Any, serve: Callable[[StreamingCache, dict[str, Any]], Any], step: Any) -> None:
    """Have calls that a step serves go to `serve`; `model.forward.step` is the step."""
    plain, most = model.forward, getattr(step, "most", 1)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = _fitting_cache(args, kwargs, most)
        return plain(*args, **kwargs) if cache is None else serve(cache, kwargs)

    wrapped: Any = forward
    wrapped.step = step
    model.forward = wrapped


def _read(cache: StreamingCache, logits: Tensor, count: int = 1) -> CausalLMOutputWithPast:
    """What a forward returns, for `count` tokens that all layers of `cache` have got."""
    cache.count_read(count)
    given: Any = {"logits": logits, _CACHE_FIELD: cache}
    return CausalLMOutputWithPast(**given)


def uninstall(model: Any) -> None:
    """Take it out again."""
    model.__dict__.pop("forward", None)


def tokens_at_once(model: Any) -> int:
    """The most tokens that the short path of `model` takes in one forward; 0 without one."""
    step = getattr(model.forward, "step", None)
    return 0 if step is None else int(getattr(step, "most", 1))


def _fitting_cache(args: tuple[Any, ...], kwargs: dict[str, Any], most: int = 1) -> StreamingCache | None:
    """The cache of a call that a step serves: one row of up to `most` tokens, no gradients."""
    ids, cache = kwargs.get("input_ids"), given_cache(kwargs)
    if args or not isinstance(ids, Tensor) or ids.shape[:-1] != (1,) or not 0 < ids.shape[1] <= most:
        return None
    if not isinstance(kwargs.get("position_ids"), Tensor) or not isinstance(kwargs.get("logits_to_keep") or 0, int):
        return None
    if any(value is not None and name not in HARMLESS for name, value in kwargs.items()):
        return None
    if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False or torch.is_grad_enabled():
        return None
    # a mixed layer, or a cache that is filled anew, needs the whole forward
    plain = type(cache) is StreamingCache and all(type(layer) is StreamingLayer for layer in cache.layers)
    return cache if plain else None
