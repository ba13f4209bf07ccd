"""How the app feels, in figures: key-to-screen delay while a reply streams, and what drawing costs the decoding.

The same loaded model is used headless and in the app, in turn, in one run; only ratios between them mean something.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from textual import events

from streamchat.base import events as ev
from streamchat.base.errors import StreamchatError
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import Load
from streamchat.engine.engine import Engine
from streamchat.tui.app import StreamchatApp, short_switch_interval
from streamchat.tui.widgets.prompt import Prompt

QUESTION = "Write a long story about a lighthouse keeper and the sea."
SIZE = (140, 40)
KEY_EVERY_S = 0.15
PATIENCE_S = 600.0
CLOSE_S = 10.0
LONGER = "give a larger --max-new-tokens"


@dataclass(frozen=True)
class UiFigures:
    """The result of one run. Delays in milliseconds, speeds in tokens a second."""

    key_to_screen_p50_ms: float
    key_to_screen_p95_ms: float
    keys: int
    app_tps: float
    """Median decode speed in the app, nobody typing."""
    headless_tps: float
    ratio: float
    """Median of app / headless, a pair a round; 1 = drawing costs the decoding nothing."""
    typing_ratio: float
    """The same while some six keys a second are typed."""
    core_share: float
    """Median share of one core that the app's thread takes while a reply streams, nobody typing."""
    rounds: int
    tokens: int
    """Of each reply."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_ui(configuration: Configuration, load: Load, rounds: int, progress: Callable[[str], None]) -> UiFigures:
    """Run the bench: a round to warm up, then `rounds` of three replies: headless, in the app, in the app with typing.

    Args:
        configuration: `max_new_tokens` is the length of each reply.
        load: Returns the loaded model; called once an engine.
        rounds: How many.
        progress: Told what is going on.

    Raises:
        StreamchatError: A reply failed, or was too short to be measured.
    """
    headless: list[float] = []
    in_app: list[float] = []
    typed: list[float] = []
    cores: list[float] = []
    delays: list[float] = []
    tokens = 0
    for number in range(rounds + 1):
        progress(f"Round {number} of {rounds}")
        plain = _headless(Engine(configuration, load))
        with short_switch_interval():
            drawn = asyncio.run(_in_app(Engine(configuration, load), configuration, typing=False))
            busy = asyncio.run(_in_app(Engine(configuration, load), configuration, typing=True))
        if number:  # the first one warms up
            headless.append(_speed(plain))
            in_app.append(_speed(drawn.stats))
            typed.append(_speed(busy.stats))
            cores.append(drawn.core_share)
            delays += busy.delays
            tokens = plain.new_tokens
    if not delays:
        raise StreamchatError(f"the replies of {tokens} tokens were over before a key was typed; {LONGER}")
    ordered = sorted(delays)
    return UiFigures(
        key_to_screen_p50_ms=1000 * _percentile(ordered, 0.5),
        key_to_screen_p95_ms=1000 * _percentile(ordered, 0.95),
        keys=len(ordered),
        app_tps=statistics.median(in_app),
        headless_tps=statistics.median(headless),
        ratio=statistics.median(a / b for a, b in zip(in_app, headless, strict=True)),
        typing_ratio=statistics.median(a / b for a, b in zip(typed, headless, strict=True)),
        core_share=statistics.median(cores),
        rounds=rounds,
        tokens=tokens,
    )


def _speed(stats: ev.TurnStats) -> float:
    if not stats.decode_tps:
        raise StreamchatError(f"a reply ended after {stats.new_tokens} token, too short for a speed; {LONGER}")
    return stats.decode_tps


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class _Outcome:
    """How the one reply of an engine ends. Events come on the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self.over = threading.Event()
        self._stats: ev.TurnStats | None = None
        self._problem = "the reply did not end"
        engine.subscribe(self._take)

    def _take(self, event: ev.Event) -> None:
        match event:
            case ev.TurnFinished(rolled_back=False):
                self._stats = event.stats
                self.over.set()
            case ev.TurnFinished(message=message):
                self._problem = message
                self.over.set()
            case ev.EngineFailed(message=message):
                self._problem = message
                self.over.set()
            case _:
                pass

    @property
    def stats(self) -> ev.TurnStats:
        """Its figures.

        Raises:
            StreamchatError: There is none.
        """
        if self._stats is None:
            raise StreamchatError(self._problem)
        return self._stats


def _headless(engine: Engine) -> ev.TurnStats:
    """One reply with nobody watching."""
    outcome = _Outcome(engine)
    engine.start()
    engine.submit(QUESTION)
    outcome.over.wait(PATIENCE_S)
    engine.close(CLOSE_S)
    return outcome.stats


@dataclass(frozen=True)
class _Drawn:
    """One reply in the app."""

    stats: ev.TurnStats
    delays: list[float]
    """Of the keys, in seconds."""
    core_share: float
    """Processor time of the app's thread over the time that the reply took."""


async def _in_app(engine: Engine, configuration: Configuration, *, typing: bool) -> _Drawn:
    """One reply in the app, with somebody typing or not."""
    app = StreamchatApp(engine, configuration)
    outcome = _Outcome(engine)
    over = outcome.over.is_set
    delays: list[float] = []
    async with app.run_test(size=SIZE):
        await _until(lambda: app.board.info is not None or over())
        prompt = app._chat.query_one(Prompt)
        prompt.insert(QUESTION)
        app.post_message(events.Key("enter", "\r"))  # the pilot's way waits for a calm app, and there is none for long
        await _until(lambda: bool(app._chat.conversation.last_reply) or over())
        began, spent = time.perf_counter(), time.thread_time()
        while not over():
            if typing:
                delays.append(await _one_key(app, prompt))
            await asyncio.sleep(KEY_EVERY_S)
        core_share = (time.thread_time() - spent) / (time.perf_counter() - began)
    engine.close(CLOSE_S)
    return _Drawn(outcome.stats, delays, core_share)


async def _one_key(app: StreamchatApp, prompt: Prompt) -> float:
    """Seconds from a key to the refresh that shows it."""
    painted = asyncio.Event()
    length = len(prompt.text)
    start = time.perf_counter()
    app.post_message(events.Key("x", "x"))
    while len(prompt.text) == length:
        await asyncio.sleep(0)
    prompt.call_after_refresh(painted.set)
    await painted.wait()
    return time.perf_counter() - start


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise StreamchatError(f"the app did not get on for {PATIENCE_S:.0f} s")
        await asyncio.sleep(0.01)
