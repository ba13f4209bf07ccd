"""`streamchat bench --decode`: time per token of the engine and of transformers' forward pass, on a full cache."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from streamchat.base.eviction_policies import DEFAULT_POLICY
from streamchat.benchmarks.figures import median_ms
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.strategy import make_cache
from streamchat.config.settings import Settings
from streamchat.conversation.chunk_size import PREFILL_CHUNK
from streamchat.conversation.conversation import EVICTION_BLOCK
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import TokenLog
from streamchat.conversation.sampling import REPETITION_WINDOW, Sampler, new_generator
from streamchat.decode.install import install, uninstall
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import LoadedModel

Clock = Callable[[], float]
"""Returns seconds since an arbitrary start."""

WARM_UP = 8
"""Untimed tokens at the start of a stream."""
EARLY = slice(2000, 3000)
LATE = slice(-1000, None)
"""In one long reply, the last tokens are compared with those of `EARLY`."""
MIN_FLAT = EARLY.stop - LATE.start
"""Tokens of the shortest reply whose early and last tokens do not overlap."""


@dataclass(frozen=True)
class StepFigures:
    """Median milliseconds per token on a full cache, with sampling and evictions, measured alternately in one run."""

    cached: int
    """Tokens in the cache: its budget."""
    tokens: int
    """Tokens timed for each figure."""
    weights: str
    """Weights of `engine_ms` and `plain_ms`: "native", "int8" or "int4"."""
    engine_ms: float
    """The engine, as in a chat."""
    native_ms: float
    """The engine on native weights."""
    plain_ms: float
    """The forward pass of transformers on the same cache and weights."""
    plain_native_ms: float
    """The forward pass of transformers on the same cache, on native weights."""
    prefill_tps: float
    """Prompt tokens per second, in chunks of 256."""
    prefill_native_tps: float
    """Prompt tokens per second on native weights."""


class EndlessReply:
    """One endless reply on a full cache, decoded with the default sampling, after `WARM_UP` tokens.

    Args:
        loaded: The model.
        cache_size: Budget in tokens; the cache is full from the start.
        short_path: Use the engine's decode step instead of the forward pass of transformers.
        clock: Measures each token.
        num_sink_tokens: First tokens, which are never evicted.
        evict: The eviction policy.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache_size: int,
        *,
        short_path: bool = True,
        clock: Clock = time.perf_counter,
        num_sink_tokens: int = 4,
        evict: str = DEFAULT_POLICY,
    ) -> None:
        model = loaded.model
        self._clock = clock
        self.model, self.short_path, self._kernels, self._decode = model, short_path, loaded.kernels, loaded.decode
        options, fit = EvictionOptions(evict, block=EVICTION_BLOCK), choose_checked_fit(model)
        self.cache = make_cache(model, fit, cache_size=cache_size, num_sink_tokens=num_sink_tokens, options=options)
        self._hook = StreamingHook(model, self.cache)
        self._log = TokenLog()
        self._feeder = Feeder(model, self.cache, self._log)
        device = self._feeder.device
        self._sample = Sampler(Settings(), device, new_generator(0, device))
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (cache_size,), generator=torch.Generator().manual_seed(1)).tolist()
        self.prefill_s = 0.0
        with self._hook:
            self._logits = self._feeder.feed(ids[:PREFILL_CHUNK])  # warms up
            self.cache.reset()
            self._log.clear()
            started = clock()
            self._logits = self._feeder.feed(ids)
            self.prefill_s = clock() - started
        self.decode(WARM_UP)

    def decode(self, count: int) -> list[float]:
        """Decode `count` tokens; return the seconds of each."""
        times = []
        uninstall(self.model)
        if self.short_path:
            install(self.model, self._kernels, self._decode)
        with self._hook:
            for _ in range(count):
                started = self._clock()
                token = self._sample(self._logits, self._log.ids[-REPETITION_WINDOW:])
                self._logits = self._feeder.forward([token])
                times.append(self._clock() - started)
        return times


def measure_step(
    loaded: LoadedModel,
    native: LoadedModel,
    *,
    cache_size: int = 1024,
    num_sink_tokens: int = 4,
    evict: str = DEFAULT_POLICY,
    tokens: int = 100,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> StepFigures:
    """Time the same model in four configurations, a few tokens each in turn, so that other load slows all alike.

    Args:
        loaded: The model, usually with quantized weights.
        native: The same model with native weights.
        cache_size: Budget of the cache, which is full from the start.
        num_sink_tokens: First tokens, which are never evicted.
        evict: The eviction policy.
        tokens: Tokens timed in each configuration.
        rounds: Rounds that these tokens are spread over.
        clock: Returns seconds; `time.thread_time` if one thread is used on a busy machine.
    """
    streams = {
        (name, short): EndlessReply(
            model, cache_size, short_path=short, clock=clock, num_sink_tokens=num_sink_tokens, evict=evict
        )
        for name, model in (("loaded", loaded), ("native", native))
        for short in (True, False)
    }
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in streams}
    gc.collect()
    for _ in range(rounds):
        for key, stream in streams.items():
            times[key] += stream.decode(max(1, tokens // rounds))
    median = {key: median_ms(values) for key, values in times.items()}
    # the first stream of a model also pays for what its libraries compile
    prefill = {key: cache_size / streams[key, False].prefill_s for key in ("loaded", "native")}
    return StepFigures(
        cached=cache_size,
        tokens=len(times["loaded", True]),
        weights=loaded.weights,
        engine_ms=median["loaded", True],
        native_ms=median["native", True],
        plain_ms=median["loaded", False],
        plain_native_ms=median["native", False],
        prefill_tps=prefill["loaded"],
        prefill_native_tps=prefill["native"],
    )


@dataclass(frozen=True)
class FlatFigures:
    """Whether the time per token stays constant in one long reply; medians in milliseconds."""

    tokens: int
    early_ms: float
    """Of the tokens `EARLY`."""
    late_ms: float
    """Of the last tokens, `LATE`."""
    ratio: float
    """Late / early."""


def compare_ends(seconds: list[float]) -> FlatFigures:
    """Compare the last tokens of a long reply with early ones.

    Args:
        seconds: Of each token; at least `MIN_FLAT`.
    """
    early, late = (median_ms(seconds[part]) for part in (EARLY, LATE))
    return FlatFigures(len(seconds), early, late, late / early)
