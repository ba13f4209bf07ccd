"""Reads the actual contents of a cache around every forward. Works with any transformers cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamchat.cache.arguments import by_keyword, given_tokens, parameter_names
from streamchat.cache.layers.layer import StreamingLayer


@dataclass(frozen=True)
class RecordedStep:
    """One forward of the model, observed from outside."""

    number: int
    """Starts at 1."""
    fed: int
    """New tokens."""
    before: int
    """Length of the longest layer before the forward."""
    lengths: tuple[int, ...]
    """Length of each layer after the forward, read from its key tensor."""
    storage_bytes: int
    """Bytes of the storage of all keys and values after the forward, independent of views."""

    @property
    def after(self) -> int:
        """Length of the longest layer after the forward."""
        return max(self.lengths, default=0)


def layer_lengths(cache: Any) -> tuple[int, ...]:
    """Return the length of every layer that has keys, read from the tensors."""
    return tuple(
        layer.keys.shape[-2] if isinstance(layer.keys, Tensor) and layer.keys.dim() > 1 else 0
        for layer in cache.layers
        if hasattr(layer, "keys")
    )


def storage_bytes(cache: Any) -> int:
    """Return the bytes of the storages of all keys and values, with their scales; a storage shared by several views
    counts once."""
    storages = {}
    for layer in cache.layers:
        stored = layer.storage.parts if isinstance(layer, StreamingLayer) and layer.storage is not None else ()
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None), *stored):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def recorded_steps(model: nn.Module, cache: Callable[[], Any]) -> Iterator[list[RecordedStep]]:
    """Context manager: record one `RecordedStep` per forward of `model`.

    Enter it before any hook that evicts: `before` is then read before that hook runs.

    Args:
        model: The causal LM.
        cache: Returns the cache to read.
    """
    steps: list[RecordedStep] = []
    names = parameter_names(model)
    running: list[tuple[int, int]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = given_tokens(by_keyword(names, args, kwargs))
        running.append((tokens.shape[1], max(layer_lengths(cache()), default=0)))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        fed, before = running.pop()
        steps.append(RecordedStep(len(steps) + 1, fed, before, layer_lengths(cache()), storage_bytes(cache())))

    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        model.register_forward_hook(leave),
    ]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def hook_count(model: nn.Module) -> int:
    """Return the number of forward hooks and pre-hooks in the model, plus methods shadowed on the model itself."""
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    return hooks + sum(callable(value) and name in ("generate", "forward") for name, value in vars(model).items())
