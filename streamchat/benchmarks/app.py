"""`streamchat bench --ui`: key-to-screen delay while a reply streams, and the cost of drawing for decoding.

One run alternates between headless and the app with the same loaded model; only ratios between them are meaningful.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace

from textual import events

from streamchat.base import events as ev
from streamchat.base.errors import StreamchatError
from streamchat.base.formatting import plural
from streamchat.base.progress import Progress
from streamchat.base.requests import Submit
from streamchat.benchmarks.figures import paired_ratio, sample_rounds
from streamchat.benchmarks.loading import about, heading, load_in_thread
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import Load
from streamchat.engine.engine import Engine
from streamchat.reports.page import Page, facts
from streamchat.tui.app import StreamchatApp, short_switch_interval
from streamchat.tui.widgets.prompt import Prompt

QUESTION = "Write a long story about a lighthouse keeper and the sea."
SIZE = (140, 40)
KEY_INTERVAL_S = 0.15
TIMEOUT_S = 600.0
CLOSE_S = 10.0
LONGER_HINT = "give a larger --max-new-tokens"


@dataclass(frozen=True)
class UiFigures:
    """Result of one run. Delays in milliseconds, speeds in tokens per second."""

    key_to_screen_p50_ms: float
    key_to_screen_p95_ms: float
    keys: int
    app_tps: float
    """Median decode speed in the app, without typing."""
    headless_tps: float
    ratio: float
    """Median of app / headless, one pair per round; 1 = drawing does not slow down decoding."""
    typing_ratio: float
    """The same while about six keys per second are typed."""
    core_share: float
    """Median share of one core that the app's thread uses while a reply streams, without typing."""
    drawing_ms_per_token: float
    """CPU time of the app's thread per token: median milliseconds."""
    rounds: int
    tokens: int
    """Tokens of each reply."""


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure the app.

    Raises:
        ModelError: The model cannot be loaded.
        StreamchatError: A reply failed, or was too short to measure.
    """
    loaded = load_in_thread(configuration, progress)
    figures = measure_ui(configuration, lambda *_: loaded, args.rounds, progress)
    table = facts(
        "The app while a reply streams",
        {
            "key to screen, median": f"{figures.key_to_screen_p50_ms:.1f} ms",
            "key to screen, 95th percentile": f"{figures.key_to_screen_p95_ms:.1f} ms ({plural(figures.keys, 'key')})",
            "decode in the app": f"{figures.app_tps:.1f} tok/s",
            "decode headless": f"{figures.headless_tps:.1f} tok/s",
            "app / headless": f"{figures.ratio:.3f}",
            "app / headless while typing": f"{figures.typing_ratio:.3f}",
            "drawing": f"{100 * figures.core_share:.1f} % of a core, {figures.drawing_ms_per_token:.2f} ms per token",
        },
    )
    lines = heading(loaded, f"{plural(figures.rounds, 'round')} of {figures.tokens} tokens")
    data = about("bench", loaded) | asdict(figures)
    return Page("bench-ui", "Responsiveness of the app", lines, [table], notes=[*loaded.notes], data=data)


def measure_ui(configuration: Configuration, load: Load, rounds: int, progress: Callable[[str], None]) -> UiFigures:
    """Run a warm-up round, then `rounds` of three replies each: headless, in the app, and in the app with typing.

    Args:
        configuration: `max_new_tokens` is the length of each reply.
        load: Returns the loaded model; called once per engine.
        rounds: Number of measured rounds.
        progress: Called with progress messages.

    Raises:
        StreamchatError: A reply failed, or was too short to measure.
    """
    # a reply that ended early would be shorter than the others
    configuration = replace(configuration, settings=replace(configuration.settings, loop_guard="off"))
    delays: list[list[float]] = []
    tokens = 0

    def reply_three_times() -> dict[str, float]:
        nonlocal tokens
        plain = _run_headless(Engine(configuration, load))
        with short_switch_interval():
            drawn = asyncio.run(_run_app(Engine(configuration, load), configuration, typing=False))
            busy = asyncio.run(_run_app(Engine(configuration, load), configuration, typing=True))
        delays.append(busy.delays)
        tokens = plain.new_tokens
        speeds = {"headless": _speed(plain), "app": _speed(drawn.stats), "typing": _speed(busy.stats)}
        return speeds | {
            "core_share": drawn.core_share,
            "drawing_ms": 1000 * drawn.core_share / speeds["app"],
        }

    samples = sample_rounds(reply_three_times, rounds, progress)
    ordered = sorted(delay for each in delays[1:] for delay in each)  # the first round warms up
    if not ordered:
        raise StreamchatError(f"the replies of {tokens} tokens finished before a key was typed; {LONGER_HINT}")
    return UiFigures(
        key_to_screen_p50_ms=1000 * _percentile(ordered, 0.5),
        key_to_screen_p95_ms=1000 * _percentile(ordered, 0.95),
        keys=len(ordered),
        app_tps=statistics.median(samples["app"]),
        headless_tps=statistics.median(samples["headless"]),
        ratio=paired_ratio(samples["app"], samples["headless"]) or 0.0,
        typing_ratio=paired_ratio(samples["typing"], samples["headless"]) or 0.0,
        core_share=statistics.median(samples["core_share"]),
        drawing_ms_per_token=statistics.median(samples["drawing_ms"]),
        rounds=rounds,
        tokens=tokens,
    )


def _speed(stats: ev.TurnStats) -> float:
    if not stats.decode_tps:
        raise StreamchatError(
            f"a reply ended after {stats.new_tokens} token, too short to measure a speed; {LONGER_HINT}"
        )
    return stats.decode_tps


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _only_reply(engine: Engine) -> Future[ev.TurnStats]:
    """Return the future figures of the engine's only reply; StreamchatError if it fails."""
    reply: Future[ev.TurnStats] = Future()

    def on_event(event: ev.Event) -> None:  # on the engine's thread
        if reply.done():
            return
        match event:
            case ev.TurnFinished(rolled_back=False):
                reply.set_result(event.stats)
            case ev.TurnFinished() | ev.EngineFailed():
                reply.set_exception(StreamchatError(event.message))
            case _:
                pass

    engine.subscribe(on_event)
    return reply


def _run_headless(engine: Engine) -> ev.TurnStats:
    """Generate one reply without a front end."""
    reply = _only_reply(engine)
    engine.start()
    engine.send(Submit(QUESTION))
    try:
        return reply.result(TIMEOUT_S)
    except TimeoutError:
        raise StreamchatError(f"the reply did not finish within {TIMEOUT_S:.0f} s") from None
    finally:
        engine.close(CLOSE_S)


@dataclass(frozen=True)
class _AppReply:
    """Figures of one reply in the app."""

    stats: ev.TurnStats
    delays: list[float]
    """Key-to-screen delays, in seconds."""
    core_share: float
    """Processor time of the app's thread divided by the duration of the reply."""


async def _run_app(engine: Engine, configuration: Configuration, *, typing: bool) -> _AppReply:
    """Generate one reply in the app, with or without typing."""
    app = StreamchatApp(engine, configuration)
    reply = _only_reply(engine)
    delays: list[float] = []
    async with app.run_test(size=SIZE):
        await _wait_for(lambda: app.state.board.info is not None or reply.done())
        prompt = app._chat.query_one(Prompt)
        prompt.insert(QUESTION)
        app.post_message(events.Key("enter", "\r"))  # not pilot.press, which waits until the app is idle
        await _wait_for(lambda: bool(app._chat.conversation.last_reply) or reply.done())
        began, spent = time.perf_counter(), time.thread_time()
        while not reply.done():
            if typing:
                delays.append(await _one_key(app, prompt))
            await asyncio.sleep(KEY_INTERVAL_S)
        core_share = (time.thread_time() - spent) / (time.perf_counter() - began)
    engine.close(CLOSE_S)
    return _AppReply(reply.result(), delays, core_share)


async def _one_key(app: StreamchatApp, prompt: Prompt) -> float:
    """Type one key; return the seconds until the refresh that shows it."""
    painted = asyncio.Event()
    length = len(prompt.text)
    start = time.perf_counter()
    app.post_message(events.Key("x", "x"))
    while len(prompt.text) == length:
        await asyncio.sleep(0)
    prompt.call_after_refresh(painted.set)
    await painted.wait()
    return time.perf_counter() - start


async def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            raise StreamchatError(f"the app made no progress within {TIMEOUT_S:.0f} s")
        await asyncio.sleep(0.01)
