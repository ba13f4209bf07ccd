"""Workloads: an endless text, and a chat with a growing history. All methods get the same ids."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streamchat.base.errors import StreamchatError
from streamchat.benchmarks.figures import failure_text
from streamchat.benchmarks.methods.stream import Stream
from streamchat.telemetry.memory import free_unused, peak_memory, process_rss

FAILURES = (StreamchatError, RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""Errors of one method, after which the others are still measured."""
SLOW_TOKENS = 3
"""Tokens that are timed if each token costs as much as a prompt."""
HISTORY_FACTOR = 6
"""Time allowed for processing history, as a multiple of the per-turn limit."""
LATE = 4
"""Text length at the second measurement of endless decoding, in cache budgets."""


@dataclass
class DecodeFigures:
    """Samples of one method over rounds, without the first round, which warms up."""

    prefill_tps: list[float] = field(default_factory=list)
    """Prefill speed in tokens per second: a prompt as long as the budget, from an empty cache."""
    early_ms: list[float] = field(default_factory=list)
    """Median milliseconds per token after one budget of text."""
    late_ms: list[float] = field(default_factory=list)
    """Median milliseconds per token after `LATE` budgets of text."""
    evicting_ms: list[float] = field(default_factory=list)
    """Part of `late_ms` that was spent on evictions, if the method reports it."""
    kv_bytes: int = 0
    """Keys and values at the end."""
    rss_bytes: int = 0
    """Growth of the process in one round, from an empty stream to its end."""
    device_bytes: int | None = None
    """Peak allocation on the device above the level before the round; None on a CPU."""
    failure: str = ""
    """Why there are no figures."""


def measure_decode(
    streams: Sequence[Stream],
    ids: Sequence[int],
    cache_size: int,
    new_tokens: int,
    rounds: int,
    progress: Callable[[str], None],
    device: str = "cpu",
) -> dict[str, DecodeFigures]:
    """Measure endless decoding. Each round runs all methods, so that they see the same state of the machine.

    Args:
        streams: Streams of the methods to compare, not started.
        ids: A text of at least `LATE` times `cache_size` tokens.
        cache_size: The cache budget in tokens, and the length of the prompt.
        new_tokens: Tokens to decode and time after each of the two lengths of text.
        rounds: Number of measured rounds, after one to warm up.
        progress: Called with progress messages.
        device: Device of the model.
    """
    found = {stream.name: DecodeFigures() for stream in streams}
    for number in range(rounds + 1):
        for stream in streams:
            figures = found[stream.name]
            if figures.failure:
                continue
            progress(f"Endless text, round {number} of {rounds}: {stream.name}")
            try:
                with peak_memory(device) as peak:
                    _decode_round(stream, ids, cache_size, new_tokens, figures if number else DecodeFigures())
                figures.device_bytes = peak()
            except FAILURES as error:
                figures.failure = failure_text(error)
    return found


def _decode_round(stream: Stream, ids: Sequence[int], cache_size: int, new_tokens: int, figures: DecodeFigures) -> None:
    free_unused()
    before = process_rss()
    count = min(new_tokens, SLOW_TOKENS) if stream.has_slow_steps else new_tokens
    with stream:
        started = time.perf_counter()
        token = stream.prefill(ids[:cache_size])
        figures.prefill_tps.append(cache_size / (time.perf_counter() - started))
        # skip the first token, whose forward has another shape
        figures.early_ms.append(1000 * statistics.median(stream.decode_timed(token, count + 1)[1:]))
        stream.append(ids[cache_size : LATE * cache_size - 1])
        token = stream.decode_step(ids[LATE * cache_size - 1])
        evicted_before = stream.evicting_s
        figures.late_ms.append(1000 * statistics.median(stream.decode_timed(token, count + 1)[1:]))
        if evicted_before is not None and stream.evicting_s is not None:
            figures.evicting_ms.append(1000 * (stream.evicting_s - evicted_before) / (count + 1))
        figures.kv_bytes = stream.kv_bytes
        figures.rss_bytes = max(figures.rss_bytes, process_rss() - before)


@dataclass(frozen=True)
class Turn:
    """One turn of a chat as ids."""

    prompt: list[int]
    """Ids to prefill before the reply."""
    reply: list[int]
    """Supplied reply, with the ids that close it."""


@dataclass
class ChatFigures:
    """Figures of one method, by turn."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Times to the first token."""
    kv_bytes: dict[int, int] = field(default_factory=dict)
    """Keys and values after the measured turns."""
    history: dict[int, int] = field(default_factory=dict)
    """Tokens before each turn."""
    skipped: dict[int, float] = field(default_factory=dict)
    """Turns that were not measured -> expected seconds of one of them."""
    unreached: dict[int, int] = field(default_factory=dict)
    """Turns that were not reached -> turn up to which the history was processed before the timeout."""
    failure: str = ""


def measure_chat(
    streams: Sequence[Stream],
    turns: Sequence[Turn],
    at: Sequence[int],
    samples: int,
    limit_s: float,
    progress: Callable[[str], None],
) -> dict[str, ChatFigures]:
    """Measure the time to the first token at given turns. Replies are supplied, so that all have the same history.

    Args:
        streams: Streams of the methods to compare, not started.
        turns: The chat; at least max(at) + samples - 1 turns.
        at: Turns to measure, counted from 1, ascending.
        samples: Consecutive turns that are timed at each of them.
        limit_s: Time limit per turn. Skips turns that would take longer, extrapolated from earlier ones, and turns
            whose history takes more than `HISTORY_FACTOR` times as long to process.
        progress: Called with progress messages.
    """
    found = {}
    for stream in streams:
        progress(f"Chat: {stream.name}")
        figures = found[stream.name] = ChatFigures()
        try:
            # warm up: the first prompts of a process are slow
            with stream:
                for turn in turns[:2]:
                    stream.prefill(turn.prompt, len(turn.reply))
                    stream.append(turn.reply)
            with stream:
                _measure_turns(stream, turns, at, samples, limit_s, figures, progress)
        except FAILURES as error:
            figures.failure = failure_text(error)
    return found


def _measure_turns(
    stream: Stream,
    turns: Sequence[Turn],
    at: Sequence[int],
    samples: int,
    limit_s: float,
    figures: ChatFigures,
    progress: Callable[[str], None],
) -> None:
    done = length = 0
    for target in at:
        earlier = turns[done : target - 1]
        history = length + sum(len(turn.prompt) + len(turn.reply) for turn in earlier)
        if (guess := _expected_s(figures, history)) > limit_s:
            figures.skipped[target] = guess
            figures.history[target] = history
            continue
        deadline = time.perf_counter() + HISTORY_FACTOR * limit_s
        for number, turn in enumerate(earlier, start=done + 1):
            if number % 25 == 0:
                progress(f"Chat: {stream.name}, turn {number}")
            # prompt and reply together, which is faster; `reserve` still marks the start of a turn
            stream.append([*turn.prompt, *turn.reply], 1)
            if time.perf_counter() > deadline:
                figures.unreached[target] = number
                figures.history[target] = history
                return
        length, times = history, []
        figures.history[target] = length
        for turn in turns[target - 1 : target - 1 + samples]:
            progress(f"Chat: {stream.name}, turn {target}")
            started = time.perf_counter()
            stream.prefill(turn.prompt, len(turn.reply))
            times.append(time.perf_counter() - started)
            stream.append(turn.reply)
            length += len(turn.prompt) + len(turn.reply)
        done = target - 1 + samples
        figures.seconds[target] = times
        figures.kv_bytes[target] = stream.kv_bytes


def _expected_s(figures: ChatFigures, history: int) -> float:
    """Extrapolate the seconds of a turn after `history` tokens from the last two measured turns; 0 if unknown."""
    known = [(figures.history[target], statistics.median(times)) for target, times in figures.seconds.items()]
    if len(known) < 2 or known[-1][0] <= known[-2][0] or known[-1][1] < 2 * known[-2][1]:
        return 0.0
    (_, _), (length, seconds) = known[-2:]
    # more than in proportion, because attention over the whole history grows faster
    return float(seconds * (history / length) ** 1.2)
