"""`streamchat bench --serve`: the API over HTTP, compared with the embedded chat on the same model.

Needs the optional packages of the server. The clients and the server are one process, so that both chats use the same
model, one after the other, and no other program's load falls on one of them only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from streamchat.base import events as ev
from streamchat.base.formatting import human_bytes, plural
from streamchat.base.progress import Progress
from streamchat.benchmarks.api_client import ApiClient
from streamchat.benchmarks.chat_text import QUESTIONS
from streamchat.benchmarks.loading import about, heading
from streamchat.config.loader import Configuration
from streamchat.models.load import LoadedModel, load_from_settings
from streamchat.reports.page import Page, Table, facts
from streamchat.server.calls import Call, Prompt
from streamchat.server.known import KnownSession
from streamchat.server.options import Options, require_libraries
from streamchat.server.seat import Seat
from streamchat.store.store import Store
from streamchat.telemetry.memory import process_rss

TURNS = 500
REPLY_TOKENS = 8
EARLY, LATE = (5, 15), (490, 500)
"""Turns whose times to the first token are compared."""
KEPT_MESSAGES, DROPPING_TURNS = 40, 200
SESSIONS, SESSION_ROUNDS = 50, 3
SLICES = (1, 2, 4, 8, 16, 32)
LONG_TOKENS = 128
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServingFigures:
    """Results of one run. Times in milliseconds, medians if not said otherwise."""

    turns: int
    early_ms: float
    """From the request to the first text, at the turns `EARLY`."""
    late_ms: float
    """The same at the turns `LATE`."""
    late_over_early: float
    embedded_late_ms: float
    """From the message to the first text in the embedded chat, at the turns `LATE`."""
    http_ms: float
    """Median of the difference of each pair of turns of the server and the embedded chat."""
    rss_growth_bytes: int
    """Memory of the process after the last turn, less that after turn 100."""
    dropped_turns: int
    most_template_tokens: int
    """Most tokens that a request prefilled besides its message, of a client that drops its oldest messages."""
    switches: int
    switch_ms: float
    """Saving the session that leaves its seat, and restoring the one that a request needs."""
    switch_p95_ms: float
    switch_rss_growth_bytes: int
    """Memory of the process after the last round, less that after the first one."""
    slices: dict[int, float]
    """Forward passes per slice -> tokens per second of two replies at a time, over that of one after the other."""
    tokens_per_s: float
    """Of one reply after the other."""


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure the server.

    Raises:
        ConfigError: An optional package is missing.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    require_libraries()
    settings = replace(configuration.settings, temperature=0.0, max_new_tokens=LONG_TOKENS, speculation="off")
    bench = _Bench(replace(configuration, settings=settings), progress)
    figures, loaded = bench.measure()
    table = facts(
        "One conversation, new messages only",
        {
            "time to the first text, turns 5-15": f"{figures.early_ms:.1f} ms",
            f"turns {LATE[0]}-{LATE[1]}": f"{figures.late_ms:.1f} ms ({figures.late_over_early:.2f} x)",
            "the embedded chat at these turns": f"{figures.embedded_late_ms:.1f} ms",
            "HTTP, matching, and saving, per turn": f"{figures.http_ms:+.1f} ms",
            "memory, turn 100 to the end": f"{human_bytes(figures.rss_growth_bytes)}",
        },
    )
    dropping = facts(
        f"A client that sends its newest {KEPT_MESSAGES} messages each time",
        {
            "turns": figures.dropped_turns,
            "tokens prefilled besides the message": f"at most {figures.most_template_tokens}",
        },
    )
    switching = facts(
        f"{plural(SESSIONS, 'session')} in turn on one seat",
        {
            "switch, median": f"{figures.switch_ms:.1f} ms",
            "switch, p95": f"{figures.switch_p95_ms:.1f} ms",
            "memory, second round to the last": f"{human_bytes(figures.switch_rss_growth_bytes)}",
        },
    )
    rows = [[str(steps), f"{ratio:.3f}"] for steps, ratio in figures.slices.items()]
    slices = Table(
        "Two replies at a time",
        ("forward passes per slice", "speed"),
        rows,
        f"Speed: tokens per second of both, over {figures.tokens_per_s:.1f} of one reply after the other.",
    )
    lines = heading(loaded, f"cache of {settings.cache_size:,} tokens", plural(figures.turns, "turn"))
    data = about("bench", loaded) | asdict(figures)
    tables = [table, dropping, switching, slices]
    return Page("bench-serve", "Serving", lines, tables, notes=[*loaded.notes], data=data)


class _Bench:
    def __init__(self, configuration: Configuration, progress: Progress) -> None:
        self._configuration, self._progress = configuration, progress
        self._loaded: LoadedModel | None = None

    def measure(self) -> tuple[ServingFigures, LoadedModel]:
        turns = self._turns()
        dropped = self._dropping()
        switches, growth = self._switching()
        slices, speed = self._slices()
        assert self._loaded is not None
        early, late = _between(turns.served, EARLY), _between(turns.served, LATE)
        figures = ServingFigures(
            turns=len(turns.served),
            early_ms=early,
            late_ms=late,
            late_over_early=late / early,
            embedded_late_ms=_between(turns.embedded, LATE),
            http_ms=1000 * statistics.median(a - b for a, b in zip(turns.served, turns.embedded, strict=True)),
            rss_growth_bytes=turns.rss[-1] - turns.rss[min(100, len(turns.rss) - 1)],
            dropped_turns=DROPPING_TURNS,
            most_template_tokens=dropped,
            switches=len(switches),
            switch_ms=1000 * statistics.median(switches),
            switch_p95_ms=1000 * statistics.quantiles(switches, n=20)[-1],
            switch_rss_growth_bytes=growth,
            slices=slices,
            tokens_per_s=speed,
        )
        return figures, self._loaded

    @contextmanager
    def _serving(self, live: int) -> Iterator[tuple[Any, ApiClient]]:
        from streamchat.server.run import ApiServer

        with tempfile.TemporaryDirectory() as folder:
            server = ApiServer(
                self._configuration,
                Options(port=0, live=live),
                open_store=lambda: Store(Path(folder) / "bench.db"),
                load=self._load,
                progress=self._progress,
            )
            server.load()
            thread = threading.Thread(target=server.serve)
            thread.start()
            try:
                assert server.model.info is not None
                yield server, ApiClient(server.port, server.model.info.name)
            finally:
                server.stop()
                thread.join()

    def _load(self, configuration: Configuration, progress: Progress) -> LoadedModel:
        if self._loaded is None:
            self._loaded = load_from_settings(configuration.settings, progress)
        return self._loaded

    # --- one conversation -------------------------------------------------------------------------------------

    def _turns(self) -> _Turns:
        """Alternate between a turn of the server and one of an embedded conversation, with the same messages."""
        found = _Turns([], [], [])
        with self._serving(2) as (server, client):
            own = _Embedded(server)
            previous: str | None = None
            for turn in range(TURNS):
                self._progress(f"Turn {turn + 1} of {TURNS}")
                text = QUESTIONS[turn % len(QUESTIONS)]
                timed = client.respond(text, previous, REPLY_TOKENS)
                previous = timed.id
                found.served.append(timed.first_s)
                found.embedded.append(own.first_s(text))
                found.rss.append(process_rss())
            own.close()
        return found

    def _dropping(self) -> int:
        """Return the most tokens that a request prefilled besides its message."""
        worst = 0
        history: list[dict[str, str]] = []
        system = {"role": "system", "content": "You are a keeper of a lighthouse. Answer in one sentence."}
        with self._serving(2) as (server, client):
            encoder = server.model.live.seats[0].conversation.encoder
            for turn in range(DROPPING_TURNS):
                self._progress(f"Turn {turn + 1} of {DROPPING_TURNS} of a client that drops messages")
                message = {"role": "user", "content": f"{turn}: {QUESTIONS[turn % len(QUESTIONS)]}"}
                reply, prefilled = client.complete([system, *history, message], REPLY_TOKENS)
                if turn:
                    worst = max(worst, prefilled - len(encoder.text(message["content"])))
                history = [*history, message, {"role": "assistant", "content": reply}][-KEPT_MESSAGES:]
        return worst

    # --- many conversations -----------------------------------------------------------------------------------

    def _switching(self) -> tuple[list[float], int]:
        """Return the times of all switches, with full caches, and the growth of memory."""
        with self._serving(1) as (server, client):
            ids = []
            long = " ".join(QUESTIONS) * max(1, self._configuration.settings.cache_size // 300)
            for number in range(SESSIONS):
                self._progress(f"Session {number + 1} of {SESSIONS}")
                ids.append(client.respond(f"{number}: {long}", None, 2).id)
            server.model.live.switch_times.clear()
            memory = []
            for _ in range(SESSION_ROUNDS):
                for number, id_ in enumerate(ids):
                    self._progress(f"Switch to session {number + 1} of {SESSIONS}")
                    ids[number] = client.respond("Go on.", id_, 2).id
                memory.append(process_rss())
            return list(server.model.live.switch_times), memory[-1] - memory[0]

    def _slices(self) -> tuple[dict[int, float], float]:
        """Return, for each length of a slice, the speed of two replies at a time over that of one after the other."""
        ratios: dict[int, list[float]] = {steps: [] for steps in SLICES}
        speeds = []
        with self._serving(2) as (server, client):
            for round_ in range(4):
                self._progress(f"Slices, round {round_} of 3")
                alone = 2 * LONG_TOKENS / _elapsed(lambda: _one_by_one(client, 2))
                for steps in SLICES:
                    server.model.scheduler.max_steps = steps
                    both = 2 * LONG_TOKENS / _elapsed(lambda: _at_once(client, 2))
                    if round_:
                        ratios[steps].append(both / alone)
                if round_:
                    speeds.append(alone)
        return {steps: statistics.median(found) for steps, found in ratios.items()}, statistics.median(speeds)


@dataclass
class _Turns:
    served: list[float]
    embedded: list[float]
    rss: list[int]


class _Embedded:
    """A conversation as of the embedded chat, saved as well, on the model of a server while that is idle."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._first = 0.0
        self._seat = self._server.model.scheduler.call(self._start)

    def _start(self) -> Seat:
        seat: Seat = self._server.model.live.make_seat()
        seat.start(KnownSession(None))
        seat.listener = self._note
        return seat

    def first_s(self, text: str) -> float:
        """Return the time from the message to the first text of its reply."""
        call = Call(Prompt(text), lambda news: None)
        started = time.perf_counter()
        self._first = 0.0
        self._server.model.scheduler.call(lambda: self._seat.run(call, text, {"max_new_tokens": REPLY_TOKENS}, ()))
        return self._first - started

    def close(self) -> None:
        """End the conversation."""
        self._server.model.scheduler.call(self._seat.close)

    def _note(self, event: ev.Event) -> None:
        if isinstance(event, ev.TextDelta) and not self._first:
            self._first = time.perf_counter()


def _between(seconds: Sequence[float], turns: tuple[int, int]) -> float:
    """Return the median of these turns, counted from 1, in milliseconds; of the last ones if there are fewer."""
    first, last = turns
    return 1000 * statistics.median(seconds[first - 1 : last] or seconds[-10:])


def _elapsed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _respond_long(client: ApiClient) -> None:
    client.respond(QUESTIONS[0], None, LONG_TOKENS)


def _one_by_one(client: ApiClient, count: int) -> None:
    for _ in range(count):
        _respond_long(client)


def _at_once(client: ApiClient, count: int) -> None:
    """Let `count` clients get a long reply at the same time."""
    threads = [threading.Thread(target=_respond_long, args=(client,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
