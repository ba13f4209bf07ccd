"""Streams: one endless text on one model, handled by one method. Scored by logits, timed by greedy tokens."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from streamchat.benchmarks.methods.registry import KINDS, Method
from streamchat.cache.arguments import cache_keyword, parameter_names
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.room import quarter_of_room
from streamchat.cache.token_ids import input_device
from streamchat.conversation.chunk_size import PREFILL_CHUNK
from streamchat.quantization.linear import never_quantized
from streamchat.verify.measure import layer_lengths, storage_bytes


class Stream(ABC):
    """What can be timed: prefill a prompt, decode tokens. Tokens are chosen greedily."""

    name: str
    description: str
    has_slow_steps = False
    """Whether a token costs as much as a prompt, so that only a few are timed."""

    @abstractmethod
    def start(self) -> None:
        """Start a new, empty stream."""

    @abstractmethod
    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        """Prefill `ids` after the existing context; wait for the device and return the next token.

        Args:
            ids: A prompt.
            reserve: Number of reply tokens expected after it.
        """

    def decode_step(self, token: int) -> int:
        """Feed one token; wait for the device and return the next token."""
        return self.prefill([token])

    def append(self, ids: Sequence[int], reserve: int = 0) -> None:
        """Add `ids` to the context, untimed; methods without a cache only store them."""
        self.prefill(ids, reserve)

    def decode_timed(self, token: int, count: int) -> list[float]:
        """Decode `count` tokens after `token`; return the seconds of each."""
        times = []
        for _ in range(count):
            started = time.perf_counter()
            token = self.decode_step(token)
            times.append(time.perf_counter() - started)
        return times

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""

    @property
    def evicting_s(self) -> float | None:
        """Seconds spent on evictions since `start`; None if the method does not report them."""
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to remove
        """Remove all hooks from the model."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ModelStream(Stream):
    """A stream on a causal LM of transformers, which can be scored as well. A subclass needs only `begin`.

    Args:
        method: The method, with its sizes.
        model: A causal LM in eval mode, without hooks of streamchat.
        fit: `choose_fit(model)`.
        chunk: Requested tokens per forward; the stream may use fewer.
        native_weights: Use native weights even if the model is quantized, except in the chat's own cache.
    """

    limit: int | None = None
    """Maximum total tokens; None = unlimited."""
    has_chat_weights = False
    """Whether quantized weights, which are streamchat's, belong to the method."""
    _cache: DynamicCache | None = None
    compressions = 0
    """Times that the method shortened the cache, by its own count."""

    def __init__(
        self,
        method: Method,
        model: Any,
        fit: PositionFit,
        chunk: int = PREFILL_CHUNK,
        *,
        native_weights: bool = False,
    ) -> None:
        self.name, self.description = method.kind, KINDS[method.kind].summary
        self.method, self.model, self.fit = method, model, fit
        self.chunk = self.fitting(chunk)
        """Maximum tokens per forward."""
        self.device = input_device(model)
        self._native_weights = native_weights and not self.has_chat_weights
        self._keyword, self._trims = cache_keyword(model), "logits_to_keep" in parameter_names(model)
        self._opened = ExitStack()

    @abstractmethod
    def begin(self) -> DynamicCache | None:
        """Return the cache of a new stream, if there is one, after attaching hooks."""

    def fitting(self, chunk: int) -> int:
        """Return how many of `chunk` tokens to feed per forward, so that each sees much of the text before it."""
        return 1 if self.fit.single_steps else quarter_of_room(self.method.budget, self.method.sinks, chunk)

    def start(self) -> None:
        self.close()
        if self._native_weights:
            self.enter(never_quantized(self.model))
        self.compressions = 0
        self._cache = self.begin()

    def enter(self, context: AbstractContextManager[Any]) -> None:
        """Enter a context until the stream is closed."""
        self._opened.enter_context(context)

    def attach(self, handle: RemovableHandle) -> None:
        """Remove a hook when the stream is closed."""
        self._opened.callback(handle.remove)

    def close(self) -> None:
        self._opened.close()

    def feed(self, ids: Tensor, keep: int = 0) -> Tensor:
        """Feed (n,) ids; return logits (n, vocabulary) in the model's dtype, or of the last `keep` tokens."""
        return self.forward(ids, keep, use_cache=True, **{self._keyword: self._cache})

    @torch.inference_mode()
    def forward(self, ids: Tensor, keep: int, **arguments: Any) -> Tensor:
        """Run (n,) ids through the model; return the logits of the last `keep` tokens, or of all if it is 0."""
        if keep and self._trims:
            arguments["logits_to_keep"] = keep
        logits: Tensor = self.model(input_ids=ids[None], **arguments).logits[0]
        return logits[-keep:]

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        last = 0
        for chunk in torch.split(self.tensor(ids), self.chunk):
            last = int(self.feed(chunk, keep=1).argmax())
        return last

    def tensor(self, ids: Sequence[int]) -> Tensor:
        """Return (n,) ids on the model's device."""
        return torch.tensor(list(ids), device=self.device)

    @property
    def length(self) -> int:
        """Tokens in the longest layer, read from its tensors."""
        return 0 if self._cache is None else max(layer_lengths(self._cache), default=0)

    @property
    def kv_bytes(self) -> int:
        return 0 if self._cache is None else storage_bytes(self._cache)


def open_stream(
    method: Method, model: Any, fit: PositionFit, chunk: int = PREFILL_CHUNK, *, native_weights: bool = False
) -> ModelStream:
    """Return the stream of a method, to be used in a `with` block; see `ModelStream`."""
    module, _, name = KINDS[method.kind].stream.partition(".")
    made: ModelStream = getattr(import_module(f"{__package__}.{module}"), name)(
        method, model, fit, chunk, native_weights=native_weights
    )
    return made
