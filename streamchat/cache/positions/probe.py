"""Instrumented forwards that reveal how a model encodes positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword

RotaryCall = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that turn positions into angles, by their class names in transformers."""
    return [module for module in model.modules() if "rotary" in type(module).__name__.lower()]


def rope_kinds(module: nn.Module) -> list[str]:
    """Return the RoPE types of a rotary module, one per layer type if they differ; none for other modules."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return list(map(str, kinds.values()))
    return [] if kinds is None else [str(kinds)]


@contextmanager
def recorded_rotary_calls(model: nn.Module) -> Iterator[list[RotaryCall]]:
    """Context manager: record the calls of rotary modules, in order."""
    calls: list[RotaryCall] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((module, args, kwargs))

    with ExitStack() as hooks:
        for module in rotary_modules(model):
            hooks.enter_context(module.register_forward_hook(record, with_kwargs=True))
        yield calls


@contextmanager
def recorded_block_input(model: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager: record the input of the first decoder block, (batch, n, hidden) float32, once per forward."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    blocks = max(lists, key=len, default=None)
    inputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        if isinstance(states, Tensor) and states.dim() == 3:
            inputs.append(states.detach().float())

    with nullcontext() if blocks is None else blocks[0].register_forward_pre_hook(record, with_kwargs=True):
        yield inputs


def plain_forward(model: Any, ids: Tensor, positions: Tensor | None, cache: Any = None) -> tuple[Any, Tensor]:
    """Run one forward on a plain `DynamicCache`; returns the cache and float32 logits (rows, n, vocabulary).

    Args:
        model: A causal LM.
        ids: (rows, n).
        positions: (rows, n), or None to leave them to the model.
        cache: The cache to continue; a new one by default.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    more = {} if positions is None else {"position_ids": positions}
    out = model(input_ids=ids, use_cache=True, **more, **{cache_keyword(model): cache})
    return cache, out.logits.float()
