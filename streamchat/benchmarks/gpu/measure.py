"""Measures one case of `bench --gpu` on a model that is loaded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from streamchat.base.errors import StreamchatError
from streamchat.base.eviction_policies import DEFAULT_POLICY
from streamchat.benchmarks.gpu.bandwidth import kernels_of, weight_bytes_per_token
from streamchat.benchmarks.gpu.cases import OURS, Case, Row, Tenth
from streamchat.benchmarks.gpu.streams import open_case
from streamchat.benchmarks.methods.stream import ModelStream
from streamchat.benchmarks.methods.streaming import Chat
from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.layers.codes import QUANTIZED as KV_DTYPES
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.token_ids import random_ids
from streamchat.config.settings import Decode
from streamchat.decode.install import install, record_used, uninstall
from streamchat.decode.report import step_report
from streamchat.decode.steps import MEANINGS
from streamchat.telemetry.memory import memory_state

WARM_UP = 12
"""Untimed tokens of each stream: a step is captured after eight."""
PROMPT = 32
"""Tokens of the prompt whose time to the first token is measured."""
PROMPTS = 3
"""Prompts that are timed, after two that are not."""
CASE_S = 3.0
"""Time after which no further round of tokens is decoded."""
TENTHS = 10


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    cache_size: int = 1024
    num_sink_tokens: int = 4
    evict: str = DEFAULT_POLICY
    new_tokens: int = 48
    """Tokens of a round."""
    rounds: int = 5

    @property
    def room(self) -> int:
        """Tokens that a static cache needs for the measurement."""
        return self.cache_size + WARM_UP + self.rounds * self.new_tokens + (PROMPTS + 2) * (PROMPT + 1) + 8


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    model: Any
    fit: PositionFit
    name: str
    """Display name."""
    device: str

    def ids(self, count: int, seed: int = 1) -> list[int]:
        """Return random ids."""
        return [int(token) for token in random_ids(self.model, count, seed=seed)[0]]


def install_step(model: Any, decode: Decode) -> None:
    """Give `model` the step of a kind.

    Raises:
        StreamchatError: There is no such step here.
    """
    uninstall(model)
    install(model, None, decode=decode)
    report = step_report(model, decode)
    if report.name not in MEANINGS[decode]:
        raise StreamchatError(f"not available: {report.reason}")


def measure_case(case: Case, subject: Subject, sizes: Sizes, bandwidth: float) -> Row:
    """Measure one case.

    Raises:
        StreamchatError: The step is not available, or was given up.
    """
    started, model = time.perf_counter(), subject.model
    vars(model).pop("forward", None)  # `generate` gets the forward of transformers, with nothing of ours around it
    set_cache_dtype(model, KV_DTYPES.get(case.kv_dtype, model.dtype))
    token_bytes = weight_bytes_per_token(model) + sizes.cache_size * kv_bytes_per_token(subject, sizes)
    if case.kind in OURS:
        decode: Any = case.kind
        install_step(model, decode)
    stream = open_case(
        case.kind,
        model,
        subject.fit,
        cache_size=sizes.cache_size,
        num_sink_tokens=sizes.num_sink_tokens,
        evict=sizes.evict,
        room=sizes.room,
    )
    row = _measure(Row(case, subject.name, token_bytes=token_bytes), stream, subject, sizes)
    _require_step(model, case.kind)
    assert row.tps is not None
    return replace(row, share=row.tps * token_bytes / bandwidth, seconds=time.perf_counter() - started)


def _measure(row: Row, stream: ModelStream, subject: Subject, sizes: Sizes) -> Row:
    text = subject.ids(sizes.cache_size)
    with stream:  # loads kernels, chooses algorithms, compiles
        stream.decode_timed(stream.prefill(text), WARM_UP)
    with stream:
        started = time.perf_counter()
        token = stream.prefill(text)
        prefill_s = time.perf_counter() - started
        stream.decode_timed(token, WARM_UP)
        times = _decode(stream, token, sizes)
        first = _first_token_s(stream, subject)
        kernels = kernels_of(lambda: stream.decode_step(token), subject.device)
        allocated = memory_state(subject.device).allocated_bytes
    count, busy_ms = kernels or (None, None)
    return replace(
        row,
        tps=1 / statistics.median(times),
        mean_tps=len(times) / sum(times),
        timed=len(times),
        kernels=count,
        busy_ms=busy_ms,
        first_token_ms=1000 * first,
        prefill_tps=sizes.cache_size / prefill_s,
        allocated=allocated,
    )


def _decode(stream: ModelStream, token: int, sizes: Sizes) -> list[float]:
    """Return the seconds of each token, without the first of each round: `generate` prepares itself in it."""
    times: list[float] = []
    deadline = time.perf_counter() + CASE_S
    for _ in range(sizes.rounds):
        times += stream.decode_timed(token, sizes.new_tokens)[1:]
        if time.perf_counter() > deadline:
            break
    return times


def _first_token_s(stream: ModelStream, subject: Subject) -> float:
    """Return the median seconds from a short prompt to the first token; a chat has captured its steps by then."""
    times = []
    for number in range(2 + PROMPTS):
        prompt = subject.ids(PROMPT, seed=number + 2)
        started = time.perf_counter()
        stream.prefill(prompt)
        times.append(time.perf_counter() - started)
        if isinstance(stream, Chat):
            record_used(subject.model, stream.streaming)
    return statistics.median(times[2:])


def _require_step(model: Any, kind: str) -> None:
    """Raise StreamchatError if the step of a kind was given up during the measurement."""
    if kind in OURS:
        decode: Any = kind
        report = step_report(model, decode)
        if report.name not in MEANINGS[decode]:
            raise StreamchatError(f"given up while it ran: {report.reason}")


def kv_bytes_per_token(subject: Subject, sizes: Sizes) -> int:
    """Return the bytes of keys and values per cached token."""
    with open_case("plain", subject.model, subject.fit, cache_size=sizes.cache_size, room=0) as stream:
        assert isinstance(stream, Chat)
        stream.prefill(subject.ids(8))
        return stream.token_bytes


def measure_flatness(subject: Subject, sizes: Sizes, tokens: int) -> Iterator[Tenth]:
    """Yield the speed of each tenth of one reply of `tokens` tokens on a full cache, as they come.

    The fastest step of the model decodes.
    """
    model = subject.model
    uninstall(model)
    install(model, None, decode="auto")
    part = tokens // TENTHS
    with open_case(
        "plain",
        model,
        subject.fit,
        cache_size=sizes.cache_size,
        num_sink_tokens=sizes.num_sink_tokens,
        evict=sizes.evict,
        room=0,
    ) as stream:
        token = stream.prefill(subject.ids(sizes.cache_size))
        stream.decode_timed(token, WARM_UP)
        for number in range(1, TENTHS + 1):
            started = time.perf_counter()
            for _ in range(part):
                token = stream.decode_step(token)
            elapsed = time.perf_counter() - started
            yield Tenth(number * part, part / elapsed, memory_state(subject.device).allocated_bytes)
