"""How long one new token takes: the path of the engine and the plain forward, with packed and with native weights."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.streaming import EvictionOptions
from streamchat.config.settings import Settings
from streamchat.conversation.conversation import EVICTION_BLOCK
from streamchat.conversation.feeder import PREFILL_CHUNK, Feeder
from streamchat.conversation.log import TokenLog
from streamchat.conversation.sampling import Sampler, new_generator
from streamchat.decode.install import install, uninstall
from streamchat.decode.native_step import CompiledStep
from streamchat.kernels.operations import ACTIVATION, ATTENTION, NORM, Operation
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import LoadedModel

Clock = Callable[[], float]
"""Seconds, from any moment on."""

WARM_UP = 8
"""Tokens before the first that counts."""


@dataclass(frozen=True)
class DecodeFigures:
    """Median milliseconds a token on a full cache, sampling and evictions included; measured in turns, in one run."""

    cached: int
    """Tokens in the cache: its budget."""
    tokens: int
    """Timed for each figure."""
    weights: str
    """What `engine_ms` and `plain_ms` ran on: "native", "int8" or "int4"."""
    dtype: str
    engine_ms: float
    """As the chat decodes."""
    native_ms: float
    """The same with the model's own weights."""
    plain_ms: float
    """The forward of transformers on the same cache, with those weights."""
    plain_native_ms: float
    """The forward of transformers on the same cache, with its own weights."""
    prefill_tps: float
    """Prompt tokens a second, in chunks of 256, with those weights."""
    prefill_native_tps: float
    """The same with the model's own weights."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Stream:
    """A full cache on one model, decoding with the default sampling."""

    def __init__(self, loaded: LoadedModel, cache_size: int, short_path: bool, clock: Clock) -> None:
        model = loaded.model
        self._clock = clock
        self.model, self.short_path = model, short_path
        options = EvictionOptions(block=EVICTION_BLOCK)
        self.cache = make_cache(
            model, choose_checked_fit(model), cache_size=cache_size, num_sink_tokens=4, options=options
        )
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

    def decode(self, count: int) -> list[float]:
        """Seconds of each of `count` tokens."""
        times = []
        uninstall(self.model)
        if self.short_path:
            install(self.model)
        with self._hook:
            for _ in range(count):
                started = self._clock()
                token = self._sample(self._logits, self._log.ids[-self._sample.window :])
                self._logits = self._feeder.forward([token])
                times.append(self._clock() - started)
        return times


def measure_decode(
    load: Callable[[str], LoadedModel],
    *,
    weights: str = "auto",
    cache_size: int = 1024,
    tokens: int = 100,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> DecodeFigures:
    """Time the same model in four ways, a few tokens each in turn, so that a busy machine slows all alike.

    Args:
        load: Loads the model with the given setting `weights`; called for "native" and for `weights`.
        weights: `auto`, `int8` or `int4`.
        cache_size: Budget of the cache, which is full from the start.
        tokens: Timed for each way.
        rounds: Turns that they are spread over.
        clock: Seconds; `time.thread_time` where one thread is used on a busy machine.
    """
    packed, native = load(weights), load("native")
    streams = {
        (loaded, short): Stream(model, cache_size, short, clock)
        for loaded, model in (("packed", packed), ("native", native))
        for short in (True, False)
    }
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in streams}
    gc.collect()
    for stream in streams.values():
        stream.decode(WARM_UP)
    for _ in range(rounds):
        for key, stream in streams.items():
            times[key] += stream.decode(max(1, tokens // rounds))
    median = {key: 1000 * statistics.median(values) for key, values in times.items()}
    # the first stream of a model also pays for what its libraries compile
    prefill = {key: cache_size / streams[key, False].prefill_s for key in ("packed", "native")}
    return DecodeFigures(
        cached=cache_size,
        tokens=len(times["packed", True]),
        weights=packed.weights,
        dtype=packed.dtype,
        engine_ms=median["packed", True],
        native_ms=median["native", True],
        plain_ms=median["packed", False],
        plain_native_ms=median["native", False],
        prefill_tps=prefill["packed"],
        prefill_native_tps=prefill["native"],
    )


def compiled_step(model: Any) -> CompiledStep | None:
    """The step of compiled kernels that `install` gave `model`."""
    step = getattr(model.forward, "step", None)
    return step if isinstance(step, CompiledStep) else None


def measure_parts(stream: Stream, step: CompiledStep, repeats: int = 100) -> dict[str, float]:
    """Median milliseconds that the operations of a token take, by kind, each kind alone; and the whole token."""
    token = 1000 * statistics.median(stream.decode(repeats))
    threads = torch.get_num_threads()
    kernels, whole = step._kernels, list(step.program(1, True, threads).operations)
    bits = {4: "int4", 8: "int8", 16: "bfloat16", 32: "float32"}
    kinds: dict[str, list[Operation]] = {}
    for each in whole:
        name = {ATTENTION: "attention", NORM: "norms", ACTIVATION: "activations"}.get(each.kind)
        kinds.setdefault(name or f"products, {bits[each.each.product.bits]}", []).append(each)
    found = {"token": token}
    for name, operations in [("kernels, all", whole), *kinds.items()]:
        part = (Operation * len(operations))(*operations)
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            kernels.run(part, len(part), threads)
            times.append(time.perf_counter() - started)
        found[f"{name} ({len(part)})"] = 1000 * statistics.median(times)
    return found


def full_stream(loaded: LoadedModel, *, cache_size: int, clock: Clock = time.perf_counter) -> Stream:
    """An endless reply as the chat decodes it, on a cache that is full, past its first tokens."""
    stream = Stream(loaded, cache_size, True, clock)
    stream.decode(WARM_UP)
    return stream


def measure_flat(loaded: LoadedModel, *, cache_size: int, tokens: int, clock: Clock = time.perf_counter) -> list[float]:
    """Seconds of each of `tokens` tokens of one endless reply."""
    return full_stream(loaded, cache_size=cache_size, clock=clock).decode(tokens)
