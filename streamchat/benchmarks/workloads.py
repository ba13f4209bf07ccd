"""What is timed: a text without an end, and a chat whose history grows. Every way gets the same ids."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streamchat.base.errors import StreamchatError
from streamchat.benchmarks.methods import Method
from streamchat.telemetry.memory import free_unused, peak_memory, process_rss

SLOW_TOKENS = 3
"""Timed where each token costs as much as a prompt."""
FILL = 6
"""Times the limit of a turn: so long the history before a place may take to be read."""
LATE = 4
"""The second measurement of endless decoding is at so many budgets of text."""


@dataclass
class DecodeFigures:
    """Samples of one way over rounds; the first round warms up and is not among them."""

    prefill_tps: list[float] = field(default_factory=list)
    """Tokens of a prompt a second, from an empty cache; a prompt of the size of the budget."""
    early_ms: list[float] = field(default_factory=list)
    """Median milliseconds a token behind one budget of text."""
    late_ms: list[float] = field(default_factory=list)
    """The same behind `LATE` budgets of text."""
    evicting_ms: list[float] = field(default_factory=list)
    """Milliseconds a token of `late_ms` that went into evictions, of a way that tells."""
    kv_bytes: int = 0
    """At the end."""
    rss_bytes: int = 0
    """How much the process grew in one round, from an empty stream to its end."""
    device_bytes: int | None = None
    """The most that was allocated on the device beside what was there before the round; None on a CPU."""
    failure: str = ""
    """Why it has no figures."""


def measure_decode(
    methods: Sequence[Method],
    ids: Sequence[int],
    cache_size: int,
    new_tokens: int,
    rounds: int,
    progress: Callable[[str], None],
    device: str = "cpu",
) -> dict[str, DecodeFigures]:
    """Endless decoding: each round runs every way in turn, so that all see the same machine.

    Args:
        methods: The ways.
        ids: A text of at least `LATE` times `cache_size` tokens.
        cache_size: The budget of those that have one, and the length of the prompt.
        new_tokens: Written and timed at each of the two places.
        rounds: Counted; one more before them warms up.
        progress: Told what is going on.
        device: Of the model.
    """
    found = {method.name: DecodeFigures() for method in methods}
    for number in range(rounds + 1):
        for method in methods:
            figures = found[method.name]
            if figures.failure:
                continue
            progress(f"Endless text, round {number} of {rounds}: {method.name}")
            try:
                with peak_memory(device) as peak:
                    _decode_round(method, ids, cache_size, new_tokens, figures if number else DecodeFigures())
                figures.device_bytes = peak()
            except (StreamchatError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                figures.failure = _short(error)
            finally:
                method.close()
    return found


def _decode_round(method: Method, ids: Sequence[int], cache_size: int, new_tokens: int, figures: DecodeFigures) -> None:
    free_unused()
    before = process_rss()
    count = min(new_tokens, SLOW_TOKENS) if method.slow_steps else new_tokens
    method.start()
    started = time.perf_counter()
    token = method.read(ids[:cache_size])
    figures.prefill_tps.append(cache_size / (time.perf_counter() - started))
    # the first token is of another shape than the others
    figures.early_ms.append(1000 * statistics.median(method.write(token, count + 1)[1:]))
    method.skip(ids[cache_size : LATE * cache_size - 1])
    token = method.step(ids[LATE * cache_size - 1])
    evicted_before = method.evicting_s
    figures.late_ms.append(1000 * statistics.median(method.write(token, count + 1)[1:]))
    if evicted_before is not None and method.evicting_s is not None:
        figures.evicting_ms.append(1000 * (method.evicting_s - evicted_before) / (count + 1))
    figures.kv_bytes = method.kv_bytes
    figures.rss_bytes = max(figures.rss_bytes, process_rss() - before)


@dataclass(frozen=True)
class Turn:
    """One turn of a chat as ids."""

    prompt: list[int]
    """What is read before the reply."""
    reply: list[int]
    """What is taken as the reply, and what closes it."""


@dataclass
class ChatFigures:
    """Seconds to the first token of one way, by turn."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    kv_bytes: dict[int, int] = field(default_factory=dict)
    """Behind the turns measured there."""
    history: dict[int, int] = field(default_factory=dict)
    """Tokens said before each turn."""
    skipped: dict[int, float] = field(default_factory=dict)
    """Turns that were not measured, and the seconds that one of them would have taken."""
    unread: dict[int, int] = field(default_factory=dict)
    """Turns that were not reached, and the turn up to which the history had been read when the time was over."""
    failure: str = ""


def measure_chat(
    methods: Sequence[Method],
    turns: Sequence[Turn],
    at: Sequence[int],
    samples: int,
    limit_s: float,
    progress: Callable[[str], None],
) -> dict[str, ChatFigures]:
    """Time to the first token when so many turns were said. Replies are given, so that all have the same history.

    Args:
        methods: The ways.
        turns: At least max(at) + samples - 1.
        at: Turns, counted from 1, ascending.
        samples: Turns in a row that are timed at each place.
        limit_s: What would take longer for one turn, by its growth so far, is left out, and so is a place whose
            history takes `FILL` times as long to be read.
        progress: Told what is going on.
    """
    found = {}
    for method in methods:
        progress(f"Chat: {method.name}")
        figures = found[method.name] = ChatFigures()
        try:
            # the first prompts of a process are slow
            method.start()
            for turn in turns[:2]:
                method.read(turn.prompt, len(turn.reply))
                method.skip(turn.reply)
            method.start()
            _chat(method, turns, at, samples, limit_s, figures, progress)
        except (StreamchatError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            figures.failure = _short(error)
        finally:
            method.close()
    return found


def _chat(
    method: Method,
    turns: Sequence[Turn],
    at: Sequence[int],
    samples: int,
    limit_s: float,
    figures: ChatFigures,
    progress: Callable[[str], None],
) -> None:
    done = said = 0
    for place in at:
        ahead = turns[done : place - 1]
        coming = said + sum(len(turn.prompt) + len(turn.reply) for turn in ahead)
        if (guess := _expected_s(figures, coming)) > limit_s:
            figures.skipped[place] = guess
            figures.history[place] = coming
            continue
        until = time.perf_counter() + FILL * limit_s
        for number, turn in enumerate(ahead, start=done + 1):
            if number % 25 == 0:
                progress(f"Chat: {method.name}, turn {number}")
            # both at once, which is quicker; a turn begins here all the same
            method.skip([*turn.prompt, *turn.reply], 1)
            if time.perf_counter() > until:
                figures.unread[place] = number
                figures.history[place] = coming
                return
        said, times = coming, []
        figures.history[place] = said
        for turn in turns[place - 1 : place - 1 + samples]:
            progress(f"Chat: {method.name}, turn {place}")
            started = time.perf_counter()
            method.read(turn.prompt, len(turn.reply))
            times.append(time.perf_counter() - started)
            method.skip(turn.reply)
            said += len(turn.prompt) + len(turn.reply)
        done = place - 1 + samples
        figures.seconds[place] = times
        figures.kv_bytes[place] = method.kv_bytes


def _expected_s(figures: ChatFigures, history: int) -> float:
    """Seconds of a turn behind `history` tokens, by the growth between the last two places; 0 where unknown."""
    known = [(figures.history[place], statistics.median(times)) for place, times in figures.seconds.items()]
    if len(known) < 2 or known[-1][0] <= known[-2][0] or known[-1][1] < 2 * known[-2][1]:
        return 0.0
    (_, _), (length, seconds) = known[-2:]
    # at least in proportion; attention over all of it grows faster
    return float(seconds * (history / length) ** 1.2)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] if isinstance(error, StreamchatError) else f"{type(error).__name__}: {text[:200]}"
