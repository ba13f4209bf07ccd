"""Methods of handling a long conversation with one model, each as its users run it: prefill a prompt, decode tokens."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from streamchat.base.eviction_policies import DEFAULT_POLICY
from streamchat.cache.arguments import cache_keyword, parameter_names
from streamchat.cache.eviction.options import Eviction, EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import make_cache
from streamchat.conversation.conversation import EVICTION_BLOCK
from streamchat.conversation.feeder import PREFILL_CHUNK, Feeder
from streamchat.conversation.log import TokenLog
from streamchat.quantization.linear import never_quantized
from streamchat.verify.measure import storage_bytes
from streamchat.verify.pitfalls import Counter, cutting_pre_hook


class Method(ABC):
    """One method, on one stream of ids. Tokens are chosen greedily."""

    name: str
    description: str
    """Description for the page."""
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

    @abstractmethod
    def decode_step(self, token: int) -> int:
        """Feed one token; wait for the device and return the next token."""

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


def _device_of(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


class Streamchat(Method):
    """The chat's own feeder, cache and hook."""

    name = "streamchat"
    description = "sinks and window, positions kept consistent"

    def __init__(
        self, model: Any, fit: PositionFit, cache_size: int, num_sink_tokens: int, evict: str = DEFAULT_POLICY
    ) -> None:
        self._model, self._fit = model, fit
        self._cache_size, self._sinks, self._evict = cache_size, num_sink_tokens, evict
        self._hook: StreamingHook | None = None

    def start(self) -> None:
        self.close()
        self._evicting_s = self._evicting_since = 0.0
        options = EvictionOptions(
            policy=self._evict, block=EVICTION_BLOCK, before_evict=self._before_evict, on_evict=self._after_evict
        )
        self._cache = make_cache(
            self._model, self._fit, cache_size=self._cache_size, num_sink_tokens=self._sinks, options=options
        )
        self._hook = StreamingHook(self._model, self._cache)
        self._hook.attach()
        self._feeder = Feeder(self._model, self._cache, TokenLog())

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        if reserve:
            self._cache.begin_turn(len(ids), reserve)
        return int(self._feeder.feed(ids).argmax())

    def decode_step(self, token: int) -> int:
        return int(self._feeder.forward([token]).argmax())

    @property
    def kv_bytes(self) -> int:
        return self._cache.kv_bytes

    @property
    def evicting_s(self) -> float | None:
        return self._evicting_s

    def _before_evict(self) -> None:
        self._evicting_since = time.perf_counter()

    def _after_evict(self, _: Eviction) -> None:
        self._evicting_s += time.perf_counter() - self._evicting_since

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()


class _TokenTimes(StoppingCriteria):
    """Records the time of each token of `generate`; never stops it."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Any:
        input_ids[0, -1].item()  # waits for the device
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _NativeWeights(Method):
    """A method that runs with native weights, even if the model is quantized."""

    _model: Any
    _own: AbstractContextManager[None] | None = None

    def start(self) -> None:
        self.close()
        self._own = never_quantized(self._model)
        self._own.__enter__()

    def close(self) -> None:
        if self._own is not None:
            self._own.__exit__(None, None, None)
            self._own = None


class Generate(_NativeWeights):
    """`model.generate` with a growing cache."""

    name = "generate"
    description = "transformers' generate, a growing cache"

    def __init__(self, model: Any, dtype: str = "") -> None:
        self._model = model
        self._keyword = cache_keyword(model)
        if dtype:
            self.name, self.description = f"generate, {dtype}", f"{self.description}, in {dtype}"

    def start(self) -> None:
        super().start()
        self._ids: list[int] = []
        self._cache = DynamicCache(config=self._model.config)

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        self._ids += ids
        self._generate(1)
        return self._ids.pop()

    def append(self, ids: Sequence[int], reserve: int = 0) -> None:
        # In chunks, because a long text in one forward would need memory for all of its logits.
        with torch.inference_mode():
            for chunk in torch.tensor([list(ids)], device=_device_of(self._model)).split(PREFILL_CHUNK, dim=1):  # type: ignore[no-untyped-call]
                self._model(input_ids=chunk, use_cache=True, **{self._keyword: self._cache}, **_last_only(self._model))
        self._ids += ids

    def decode_step(self, token: int) -> int:
        self._ids.append(token)
        self._generate(1)
        return self._ids.pop()

    def decode_timed(self, token: int, count: int) -> list[float]:
        self._ids.append(token)
        started = time.perf_counter()
        stamps = self._generate(count)
        return [later - earlier for earlier, later in zip([started, *stamps], stamps, strict=False)]

    def _generate(self, count: int) -> list[float]:
        """Generate `count` more ids; return the time of each, as of `perf_counter`."""
        ids = torch.tensor([self._ids], device=_device_of(self._model))
        stamps = _TokenTimes()
        out: Tensor = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            stopping_criteria=StoppingCriteriaList([stamps]),
            **{self._keyword: self._cache},
        )
        self._ids = out[0].tolist()
        return stamps.at

    @property
    def kv_bytes(self) -> int:
        return storage_bytes(self._cache)


class ReRead(Generate):
    """`model.generate` over the whole history at every turn, as `transformers chat` and most scripts do."""

    name = "re-read"
    description = "generate over the whole history at each turn, as `transformers chat` does"

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        self._cache = DynamicCache(config=self._model.config)
        return super().prefill(ids, reserve)

    def append(self, ids: Sequence[int], reserve: int = 0) -> None:
        self._ids += ids


class Recompute(_NativeWeights):
    """The paper's sliding window with re-computation: no cache, the window is prefilled again for each token."""

    name = "recompute"
    description = "the window is prefilled again for each token"
    has_slow_steps = True

    def __init__(self, model: Any, cache_size: int) -> None:
        self._model, self._cache_size = model, cache_size

    def start(self) -> None:
        super().start()
        self._ids: list[int] = []

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        self._ids = [*self._ids, *ids][-self._cache_size :]
        tokens = torch.tensor([self._ids], device=_device_of(self._model))
        return int(self._model(input_ids=tokens, use_cache=False, **_last_only(self._model)).logits[0, -1].argmax())

    def append(self, ids: Sequence[int], reserve: int = 0) -> None:
        self._ids = [*self._ids, *ids][-self._cache_size :]

    def decode_step(self, token: int) -> int:
        return self.prefill([token])

    @property
    def kv_bytes(self) -> int:
        return 0


class Cut(_NativeWeights):
    """A common hook: crops keys and values of every layer before a forward, so new positions follow the new length."""

    name = "cut"
    description = "a hook that crops every layer's keys and ignores positions: wrong output, see `streamchat ppl`"

    def __init__(self, model: Any, cache_size: int, num_sink_tokens: int) -> None:
        self._model, self._cache_size, self._sinks = model, cache_size, num_sink_tokens
        self._keyword = cache_keyword(model)
        self._hook: AbstractContextManager[None] | None = None

    def start(self) -> None:
        super().start()
        self._cache = DynamicCache(config=self._model.config)
        self._hook = cutting_pre_hook(self._model, Counter(), self._cache_size, self._sinks)
        self._hook.__enter__()

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        # a prompt that does not fit next to the sinks cannot be prefilled in one forward
        size = min(PREFILL_CHUNK, max(1, (self._cache_size - self._sinks) // 4))
        last = 0
        for chunk in torch.tensor([list(ids)], device=_device_of(self._model)).split(size, dim=1):  # type: ignore[no-untyped-call]
            out = self._model(
                input_ids=chunk, use_cache=True, **{self._keyword: self._cache}, **_last_only(self._model)
            )
            last = int(out.logits[0, -1].argmax())
        return last

    def decode_step(self, token: int) -> int:
        return self.prefill([token])

    @property
    def kv_bytes(self) -> int:
        return storage_bytes(self._cache)

    def close(self) -> None:
        super().close()
        if self._hook is not None:
            self._hook.__exit__(None, None, None)
            self._hook = None


def _last_only(model: Any) -> dict[str, int]:
    """Return the argument that limits logits to the last token, if the model supports it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in parameter_names(model) else {}


def make_methods(
    model: Any, fit: PositionFit, cache_size: int, num_sink_tokens: int, evict: str = DEFAULT_POLICY
) -> list[Method]:
    """Return all methods that need only transformers; ours first, with the eviction policy `evict`."""
    return [
        Streamchat(model, fit, cache_size, num_sink_tokens, evict),
        Generate(model),
        ReRead(model),
        Recompute(model, cache_size),
        Cut(model, cache_size, num_sink_tokens),
    ]
