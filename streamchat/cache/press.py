"""StreamingLLM for `model.generate(...)` and custom loops: a context manager around a model."""

from __future__ import annotations

import copy
import functools
import inspect
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from streamchat.base.errors import CacheError, CacheNotSeenError, ConfigError
from streamchat.cache.arguments import CACHE_NAMES, by_keyword, cache_keyword, given_cache
from streamchat.cache.context import context_length
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.fed_tokens import FedTokens
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.codes import CacheDtype
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.probe import rope_kinds, rotary_modules
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.room import budget_from_ratio
from streamchat.cache.streaming import StreamingCache
from streamchat.cache.wrappers import causal_lm

DEFAULT_CACHE_SIZE = 1024
# options of `generate` that turn on assisted (speculative) decoding
CANDIDATE_OPTIONS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class StreamingPress:
    """Keeps a model's cache at attention sinks + recent window (StreamingLLM, arXiv:2309.17453).

    ```python
    with StreamingPress(model, num_sink_tokens=4, cache_size=1024) as press:
        model.generate(input_ids, max_new_tokens=100_000)
        print(press.compression_count, press.lengths)
    ```

    Inside the block every forward of the model uses `press.cache`, whatever calls it: `generate` (sampling, beams,
    several sequences) or a loop. A `generate` or a forward that starts a text gets it automatically; to continue the
    text, pass it as `cache` (`past_key_values` before transformers 5.24). Rows of a batch must have equal length,
    without padding. The cache outlives the block and can be continued in another one. A block in which no forward of
    the model ran raises `CacheNotSeenError` when it ends.

    Differences from the paper: see `StreamingCache`. Models whose positions cannot be moved (GPT-2, OPT) prefill the
    remaining tokens again after an eviction (`method` is "recompute").

    Args:
        model: A transformers causal LM in eval mode, or a wrapper around one (PEFT, `torch.compile`, DataParallel): the
            model inside streams, whatever calls it. The constructor measures and checks it once.
        num_sink_tokens: Number of tokens at the start that are never evicted.
        cache_size: The budget in tokens, including sinks; no layer ever exceeds it. Defaults to 1,024, or to the
            model's context length if that is smaller.
        compression_ratio: Instead of `cache_size`: max(num_sink_tokens + 10, int(context * (1 - ratio))).
        options: How to evict; by default token by token, as in the paper.
        fit: Result of `choose_fit(model)`, to measure only once for several presses.
        dtype: Dtype of the cached keys and values, or `torch.int8` for 8-bit codes, or a pair for keys and values; None
            for that of the model.

    Raises:
        UnsupportedModelError: A streaming cache would give wrong output with this model, or its wrapper adds to the
            text.
        ConfigError: The sizes are impossible.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_sink_tokens: int = 4,
        cache_size: int | None = None,
        compression_ratio: float | None = None,
        options: EvictionOptions | None = None,
        fit: PositionFit | None = None,
        dtype: CacheDtype | None = None,
    ) -> None:
        self.model = model
        self.causal_lm = causal_lm(model)
        """The model inside `model`, to which the hook is attached."""
        size = _budget(context_length(self.causal_lm.config), num_sink_tokens, cache_size, compression_ratio)
        self.fit = fit or choose_fit(self.causal_lm)
        self.cache: StreamingCache = make_cache(
            self.causal_lm,
            self.fit,
            cache_size=size,
            num_sink_tokens=num_sink_tokens,
            options=options,
            dtype=dtype or self.causal_lm.dtype,
        )
        self.cache.fed_tokens = FedTokens()
        self._hook = _PressHook(self.causal_lm, self.cache)
        self._replaced: dict[str, Any] = {}

    # --- figures ----------------------------------------------------------------------------------------------

    @property
    def cache_size(self) -> int:
        """The budget in tokens."""
        return self.cache.cache_size

    @property
    def method(self) -> str:
        """How positions are handled: "rotation", "no positions" or "recompute"."""
        return self.fit.method

    @property
    def compression_count(self) -> int:
        """Evictions so far; each counts once, not once per layer."""
        return self.cache.compression_count

    @property
    def tokens_evicted(self) -> int:
        """Tokens evicted since the start or the last `reset`."""
        return self.cache.tokens_evicted

    @property
    def tokens_seen(self) -> int:
        """Tokens fed since the start or the last `reset`."""
        return self.cache.ledger.next_index

    @property
    def lengths(self) -> list[int]:
        """The actual length of every layer with keys and values, read from its tensors."""
        return self.cache.lengths

    def reset(self) -> None:
        """Empty the cache, to start a new text."""
        self.cache.reset()

    # --- the block --------------------------------------------------------------------------------------------

    def __enter__(self) -> StreamingPress:
        if self._hook.attached:
            raise CacheError("this StreamingPress is already in use; exit its block first, or create another press")
        causal_lm(self.model)  # adapters may have been added since
        self._hook.attach()
        self._hook.calls = 0
        self._replace("forward", _hooked_forward(self.causal_lm, self._hook))
        self._replace("generate", _checked_generate(self))
        if any("longrope" in rope_kinds(module) for module in rotary_modules(self.causal_lm)):
            # Phi-3's version drops the cache when the text exceeds the range of its short factors; our positions do not
            plain: Any = GenerationMixin.prepare_inputs_for_generation
            self._replace("prepare_inputs_for_generation", plain.__get__(self.causal_lm))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        self.cache.reports_stream_length = False
        for name, before in self._replaced.items():
            self.causal_lm.__dict__.pop(name, None)
            if before is not None:
                self.causal_lm.__dict__[name] = before
        self._replaced.clear()
        if error is None and self._hook.calls == 0:
            raise CacheNotSeenError(
                f"no forward of the {type(self.causal_lm).__name__} that this StreamingPress was given ran inside its "
                "block, so nothing was streamed; call that model, not a copy of it, and do not compile a function "
                "around it before the block"
            )

    def _replace(self, name: str, method: Any) -> None:
        """Shadow a method on this instance only; `__exit__` restores an instance attribute (accelerate's forward)."""
        self._replaced[name] = self.causal_lm.__dict__.get(name)
        self.causal_lm.__dict__[name] = method


class _PressHook(StreamingHook):
    """Outside of forwards, `generate` must get the length of the text; inside them, the model that of the cache."""

    calls = 0
    """Calls that reached the press in this block, including refused ones."""
    prepared = False
    """The hooks have run for the next forward."""

    def attach(self) -> None:
        super().attach()
        self.cache.reports_stream_length = True
        self._handles.append(self.model.register_forward_hook(self._leave_forward, always_call=True))

    def _before_forward(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.calls += 1
        self.cache.reports_stream_length = False
        try:
            prepared = super()._before_forward(module, args, self._with_cache(by_keyword(self._names, args, kwargs)))
        except BaseException:
            self.cache.reports_stream_length = True  # no post-hook runs after a pre-hook that raised
            raise
        self.cache.reports_stream_length = False  # forwards of the first chunks have set it
        self.prepared = True
        return (), prepared[1]

    def _leave_forward(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.cache.reports_stream_length, self.prepared = True, False

    def _with_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Insert our cache if the call has none, or an empty `DynamicCache`, which `generate` creates by default."""
        given = given_cache(kwargs)
        if given is None and kwargs.get("use_cache") is not False:
            name = cache_keyword(self.model)
        elif type(given) is DynamicCache and given.get_seq_length() == 0:
            name = next(name for name, value in kwargs.items() if value is given)
        else:
            return kwargs
        if self.cache.length:
            raise CacheNotSeenError(
                f"a new text was started without a cache while the press has {self.cache.length} cached tokens of "
                "another; pass press.cache to continue that one, or call press.reset() first"
            )
        others = {key: value for key, value in kwargs.items() if key not in CACHE_NAMES}
        return {**others, name: self.cache, "use_cache": True}


def _hooked_forward(model: Any, hook: _PressHook) -> Any:
    """Return `model.forward` for the block: called directly, as some wrappers do, it would bypass the hooks."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not hook.prepared:
            return model(*args, **kwargs)
        hook.prepared = False
        return original(*args, **kwargs)

    # a compiler must not trace it, only the functions that it calls
    return torch.compiler.disable(forward, recursive=False)  # type: ignore[no-untyped-call]


def _checked_generate(press: StreamingPress) -> Any:
    """Return `generate` with checks of its inputs on a filled cache, where mistakes would be silent."""
    original = press.causal_lm.generate
    names = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        press._hook.calls += 1
        kwargs = by_keyword(names, args, kwargs)
        _refuse_candidates(press.causal_lm, kwargs)
        inputs = kwargs.get("inputs", kwargs.get("input_ids"))
        if given_cache(kwargs) is press.cache and press.tokens_seen and isinstance(inputs, Tensor):
            _check_continuation(press, inputs, kwargs.get("attention_mask"))
        return original(**_with_use_cache(kwargs))

    return generate


def _refuse_candidates(model: Any, kwargs: dict[str, Any]) -> None:
    """Raise CacheError for assisted decoding, which feeds tokens that may be rejected later."""
    configs = [kwargs.get("generation_config"), model.generation_config]
    ways = [name for name in CANDIDATE_OPTIONS if kwargs.get(name) or any(getattr(c, name, None) for c in configs)]
    if ways:
        raise CacheError(
            f"{ways[0]} makes generate feed candidates that may be rejected, and tokens evicted to make room for them "
            "would be lost; do not use it inside a StreamingPress"
        )


def _with_use_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Enable the cache if the model's configuration (MPT) disables it: each step would feed the whole text."""
    given = kwargs.get("generation_config")
    if given is None:
        return {"use_cache": True, **kwargs}
    if getattr(given, "use_cache", None) is None:  # transformers takes a configuration or arguments, not both
        given = copy.deepcopy(given)
        given.use_cache = True
    return {**kwargs, "generation_config": given}


def _check_continuation(press: StreamingPress, inputs: Tensor, mask: Any) -> None:
    """Raise CacheError unless `inputs` are the whole text, or new tokens with a mask as long as the text."""
    fed_tokens = press.cache.fed_tokens
    assert fed_tokens is not None
    count, known = inputs.shape[1], press.tokens_seen
    how = (
        f"pass the whole text (the {known} tokens that the cache was fed, and more), or new tokens with "
        f"attention_mask=torch.ones(batch, {known} + n)"
    )
    if inputs.shape[0] != fed_tokens.rows:
        raise CacheError(
            f"the cache has a batch of {fed_tokens.rows} but generate was given {inputs.shape[0]}; call press.reset(), "
            "or continue the same batch"
        )
    columns = count if mask is None else mask.shape[1]
    if columns == known + count:
        return
    if columns != count:
        raise CacheError(
            f"attention_mask has {columns} columns for {count} tokens on a cache that was fed {known}; {how}"
        )
    if count <= known or not fed_tokens.is_prefix_of(inputs):
        what = "do not start with" if count > known else "are not more than"
        raise CacheError(f"these {count} tokens {what} the {known} that the cache was fed; {how}")


def _budget(context: int | None, sinks: int, cache_size: int | None, ratio: float | None) -> int:
    if ratio is None:
        return cache_size if cache_size is not None else min(DEFAULT_CACHE_SIZE, context or DEFAULT_CACHE_SIZE)
    if cache_size is not None:
        raise ConfigError("cache_size and compression_ratio both set the budget; give only one of them")
    if not 0 <= ratio < 1:
        raise ConfigError(f"compression_ratio = {ratio} must be at least 0 and below 1")
    if context is None:
        raise ConfigError("compression_ratio needs a model with a known context length; give cache_size instead")
    return budget_from_ratio(context, ratio, sinks)
