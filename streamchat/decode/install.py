"""Install a decode step in a model: its forward uses the step for calls that the step supports."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from streamchat.cache.arguments import CACHE_NAMES, given_cache
from streamchat.cache.attention_backends import without_plans
from streamchat.cache.layers.codes import QUANTIZED, CacheDtype
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.streaming import StreamingCache
from streamchat.cache.token_ids import input_device
from streamchat.config.settings import Decode
from streamchat.decode.captured_steps import CapturedSteps
from streamchat.decode.cuda_graph import CudaRecorder, Record
from streamchat.decode.eager import Step, decode_step
from streamchat.decode.families.registry import model_spec
from streamchat.decode.fused.step import INCOMPLETE, FusedStep, fused_step, unavailable
from streamchat.decode.native_step import CACHE_FORMATS, CompiledStep, kernels_support
from streamchat.decode.static import static_step
from streamchat.kernels.library import Kernels

_log = logging.getLogger(__name__)

# Arguments that a step honors or may ignore; a call with any other argument runs the plain forward.
HARMLESS = {"input_ids", "position_ids", "use_cache", "logits_to_keep", "return_dict", *CACHE_NAMES}
_CACHE_FIELD = next(name for name in CACHE_NAMES if name in {f.name for f in fields(CausalLMOutputWithPast)})


def install(model: Any, kernels: Kernels | None, decode: Decode = "auto") -> bool:
    """Give `model` a short path for one new token or a few on a `StreamingCache`; returns whether it has one.

    A shorter forward on a CPU, a captured one on one CUDA device, none elsewhere. Hooks on the model itself still run;
    hooks on its inner modules do not run on the short path. A step keeps the weights that it was built from: after
    replacing parameters, `uninstall` it and install it again.

    Args:
        model: A causal LM in eval mode; its `forward` is replaced.
        kernels: Compiled kernels for a CPU, if they support the whole model; None for PyTorch's.
        decode: The setting. Whatever a model, a device or an error rules out is followed by the next: `fused` kernels
            (on a CPU: the compiled ones), the `graph` of PyTorch's operations (on a CPU: not captured), `plain`. `auto`
            is the same as `fused`, without a warning if there are no fused kernels.
    """
    device = input_device(model)
    spread = any(weights.device != device for weights in model.parameters())
    if device.type == "cuda":
        model.forward = without_plans(model.forward)
        return not spread and install_captured(model, CudaRecorder(device), decode)
    if device.type != "cpu" or decode == "plain":
        return False
    return not spread and _install_short(model, None if decode == "graph" else kernels)


def _install_short(model: Any, kernels: Kernels | None) -> bool:
    step = _cpu_step(model, kernels)
    if step is None:
        return False
    plain = model.forward

    def serve(cache: StreamingCache, kwargs: dict[str, Any]) -> Any:
        if isinstance(step, CompiledStep) and cache.dtype not in (None, *CACHE_FORMATS):
            return plain(**kwargs)
        layers: Any = cache.layers
        ids, keep = kwargs["input_ids"], kwargs.get("logits_to_keep") or 0
        if isinstance(step, CompiledStep):
            logits = step(ids, kwargs["position_ids"], layers, last_only=keep == 1)
        else:
            logits = step(ids, kwargs["position_ids"], layers)
        return _output(cache, logits[:, -keep:], ids.shape[1])

    _wrap(model, serve, step)
    return True


def _cpu_step(model: Any, kernels: Kernels | None) -> Step | CompiledStep | None:
    """Return a step of compiled kernels if there are any and they support the whole model, else of PyTorch's."""
    spec = model_spec(model)
    if spec is None:
        return None
    return CompiledStep(spec, kernels) if kernels is not None and kernels_support(spec) else decode_step(spec)


def install_captured(model: Any, record: Record, decode: Decode = "auto") -> bool:
    """Have `record` capture the steps of `model` when it decodes; return whether the model has such steps.

    Plain forwards run without attention kernels that keep a plan for every length, also without such a step.
    """
    model.forward = without_plans(model.forward)
    step = None if decode == "plain" else static_step(model)
    if step is None:
        return False
    fused, reason = (None, "decode = graph") if decode == "graph" else _compiled_fused_step(model, decode == "fused")
    captured, plain = CapturedSteps(model, step, record, fused, reason), model.forward

    def serve(cache: StreamingCache, kwargs: dict[str, Any]) -> Any:
        count = kwargs["input_ids"].shape[1]
        wants_more = count > 1 and kwargs.get("logits_to_keep") != 1  # a prompt step gives those of the last token
        other = cache.dtype not in (None, model.dtype, *QUANTIZED.values())
        if wants_more or other:  # a captured step reads and writes the model's dtype, or codes
            return plain(**kwargs)
        layers: Any = cache.layers
        chosen = captured.of(count)
        logits = chosen(kwargs["input_ids"], kwargs["position_ids"], layers)
        if logits is not None:
            return _output(cache, logits, count)
        output = plain(**kwargs)
        output.logits = chosen.resolve_check(output.logits)
        return output

    _wrap(model, serve, captured)
    return True


def _compiled_fused_step(model: Any, is_wanted: bool) -> tuple[FusedStep | None, str]:
    """Return the fused step of `model`, compiled; or None and why there is none, which is logged."""
    device = input_device(model)
    reason = unavailable(device)
    try:
        step = None if reason else fused_step(model, device)
        if step is not None:
            step.compile()
            return step, ""
        reason = reason or INCOMPLETE
        level = logging.WARNING if is_wanted else logging.INFO
    except Exception as error:  # whatever a compiler raises, there are other steps
        reason, level = f"{type(error).__name__}: {error}", logging.WARNING
    _log.log(level, "decoding without fused kernels: %s", reason)
    return None, reason


def uses_fused_kernels(model: Any) -> bool:
    """Return whether fused kernels decode for `model`."""
    step = getattr(model.forward, "step", None)
    return isinstance(step, CapturedSteps) and step.is_fused


def no_fused_kernels_for(model: Any, dtype: CacheDtype) -> str:
    """Compile the fused kernels of `model` for caches in `dtype`; return why they cannot decode, '' if they can.

    After an error, the fused kernels are given up, and it is logged.
    """
    step = getattr(model.forward, "step", None)
    if isinstance(step, CapturedSteps):
        return step.compile_for(dtype)
    return f"there are no {'compiled' if input_device(model).type == 'cpu' else 'fused'} kernels"


def record_used(model: Any, cache: StreamingCache) -> None:
    """Capture the steps of `model` for short prompts of the lengths that `cache` was fed with; not during a reply."""
    step = getattr(model.forward, "step", None)
    if isinstance(step, CapturedSteps) and type(cache) is StreamingCache:
        layers: Any = cache.layers
        step.record_used(layers)


def _wrap(model: Any, serve: Callable[[StreamingCache, dict[str, Any]], Any], step: Any) -> None:
    """Route calls that `step` supports to `serve`; sets `model.forward.step` to the step."""
    model.forward = _ShortForward(model.forward, serve, step)


class _ShortForward:
    """The forward of a model that has a step; a copy or pickle of the model gets the plain forward of its own."""

    def __init__(self, plain: Any, serve: Callable[[StreamingCache, dict[str, Any]], Any], step: Any) -> None:
        functools.update_wrapper(self, plain)
        self._plain, self._serve = plain, serve
        self._max_tokens = max(getattr(step, "max_tokens", 1), getattr(step, "max_prompt", 1))
        self.step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = _supported_cache(args, kwargs, self._max_tokens)
        return self._plain(*args, **kwargs) if cache is None else self._serve(cache, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._plain, memo)

    def __reduce__(self) -> Any:
        return _same, (self._plain,)


def _same(value: Any) -> Any:
    return value


def _output(cache: StreamingCache, logits: Tensor, count: int = 1) -> CausalLMOutputWithPast:
    """Advance `cache` by the `count` tokens that its layers got; return the output of the forward."""
    cache.advance(count)
    given: Any = {"logits": logits, _CACHE_FIELD: cache}
    return CausalLMOutputWithPast(**given)


def uninstall(model: Any) -> None:
    """Remove the decode path; the limit on attention kernels stays."""
    forward = model.__dict__.pop("forward", None)
    limited = getattr(forward, "without_plans", None)
    if limited is not None:
        model.forward = limited


def is_compiled(model: Any) -> bool:
    """Return whether compiled kernels decode for `model`."""
    return isinstance(getattr(model.forward, "step", None), CompiledStep)


def tokens_at_once(model: Any) -> int:
    """Return the maximum number of tokens per forward for whose logits `model` has a short path; 0 without one."""
    step = getattr(model.forward, "step", None)
    return 0 if step is None else int(getattr(step, "max_tokens", 1))


def _supported_cache(args: tuple[Any, ...], kwargs: dict[str, Any], max_tokens: int = 1) -> StreamingCache | None:
    """Return the cache of a call that a step supports: one row of up to `max_tokens` tokens, no gradients."""
    ids, cache = kwargs.get("input_ids"), given_cache(kwargs)
    if args or not isinstance(ids, Tensor) or ids.shape[:-1] != (1,) or not 0 < ids.shape[1] <= max_tokens:
        return None
    if not isinstance(kwargs.get("position_ids"), Tensor) or not isinstance(kwargs.get("logits_to_keep") or 0, int):
        return None
    if any(value is not None and name not in HARMLESS for name, value in kwargs.items()):
        return None
    if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False or torch.is_grad_enabled():
        return None
    # a mixed layer, or a cache that must be refilled, needs the plain forward
    plain = type(cache) is StreamingCache and all(type(layer) is StreamingLayer for layer in cache.layers)
    return cache if plain else None
