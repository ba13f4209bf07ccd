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
from textual.pilot import Pilot

from streamchat.chat import events as ev
from streamchat.chat.assemble import Load
from streamchat.chat.engine import Engine
from streamchat.config import Configuration
from streamchat.tui.app import StreamchatApp, shared_interpreter
from streamchat.tui.widgets.prompt import Prompt

QUESTION = "Write a long story about a lighthouse keeper and the sea."
SIZE = (140, 40)
KEY_EVERY_S = 0.15
PATIENCE_S = 600.0


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
    """
    headless: list[float] = []
    in_app: list[float] = []
    typed: list[float] = []
    delays: list[float] = []
    tokens = 0
    for number in range(rounds + 1):
        progress(f"Round {number} of {rounds}")
        plain = _headless(Engine(configuration, load))
        with shared_interpreter():
            drawn, _ = asyncio.run(_in_app(Engine(configuration, load), configuration, typing=False))
            busy, keys = asyncio.run(_in_app(Engine(configuration, load), configuration, typing=True))
        if number:  # the first one warms up
            headless.append(plain.decode_tps or 0.0)
            in_app.append(drawn.decode_tps or 0.0)
            typed.append(busy.decode_tps or 0.0)
            delays += keys
            tokens = plain.new_tokens
    app_tps, headless_tps = statistics.median(in_app), statistics.median(headless)
    ordered = sorted(delays)
    return UiFigures(
        key_to_screen_p50_ms=1000 * _percentile(ordered, 0.5),
        key_to_screen_p95_ms=1000 * _percentile(ordered, 0.95),
        keys=len(ordered),
        app_tps=app_tps,
        headless_tps=headless_tps,
        ratio=statistics.median(a / b for a, b in zip(in_app, headless, strict=True)),
        typing_ratio=statistics.median(a / b for a, b in zip(typed, headless, strict=True)),
        rounds=rounds,
        tokens=tokens,
    )


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _headless(engine: Engine) -> ev.TurnStats:
    """One reply with nobody watching."""
    done = threading.Event()
    found: list[ev.TurnStats] = []
    failed: list[str] = []

    def take(event: ev.Event) -> None:
        match event:
            case ev.TurnFinished(stats=stats):
                found.append(stats)
                done.set()
            case ev.EngineFailed(message=message):
                failed.append(message)
                done.set()
            case _:
                pass

    engine.subscribe(take)
    engine.start()
    engine.submit(QUESTION)
    if not done.wait(PATIENCE_S) or failed:
        engine.close()
        raise RuntimeError(failed[0] if failed else "the reply did not end")
    engine.close(10)
    return found[0]


async def _in_app(engine: Engine, configuration: Configuration, *, typing: bool) -> tuple[ev.TurnStats, list[float]]:
    """One reply in the app; returns its figures and the delays of the keys in seconds."""
    app = StreamchatApp(engine, configuration)
    finished: list[ev.TurnStats] = []

    def take(event: ev.Event) -> None:
        if isinstance(event, ev.TurnFinished):
            finished.append(event.stats)

    engine.subscribe(take)
    delays: list[float] = []
    async with app.run_test(size=SIZE) as pilot:
        await _until(lambda: app.board.info is not None)
        prompt = app._chat.query_one(Prompt)
        prompt.insert(QUESTION)
        await pilot.press("enter")
        await _until(lambda: bool(app._chat.conversation.last_reply) or bool(finished))
        while not finished:
            if typing:
                delays.append(await _one_key(app, prompt, pilot))
            await asyncio.sleep(KEY_EVERY_S)
    engine.close(10)
    return finished[0], delays


async def _one_key(app: StreamchatApp, prompt: Prompt, pilot: Pilot[int]) -> float:
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
            raise RuntimeError("the app did not get there")
        await asyncio.sleep(0.01)
