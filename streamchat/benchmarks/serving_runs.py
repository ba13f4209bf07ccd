"""What `streamchat bench --serve` measures."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from streamchat.base import events as ev
from streamchat.base.progress import Progress
from streamchat.benchmarks.api_client import ApiClient, client_named
from streamchat.benchmarks.chat_text import QUESTIONS
from streamchat.benchmarks.fed_tokens import FedTokens, counted_tokens
from streamchat.config.loader import Configuration
from streamchat.models.load import LoadedModel, load_from_settings
from streamchat.server.calls import Call, Prompt
from streamchat.server.known import KnownSession
from streamchat.server.live_sessions import SwitchTime
from streamchat.server.options import Options
from streamchat.server.seat import Seat
from streamchat.store.store import Store
from streamchat.telemetry.memory import process_rss

REPLY_TOKENS = 8
KEPT_MESSAGES = 40
SLICES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    turns: int
    """Turns of one conversation; the client that drops messages has two fifths of them."""
    sessions: int
    tokens: int
    """Tokens of each of the replies that take turns."""
    rounds: int


@dataclass(frozen=True)
class Timing:
    """Time of something, in seconds."""

    elapsed_s: float
    cpu_s: float


@dataclass
class _Result:
    def as_dict(self) -> dict[str, Any]:
        """Return the figures, for JSON."""
        return asdict(self)


@dataclass
class Turns(_Result):
    """One conversation over HTTP, and the same messages in a conversation without it, turn by turn."""

    client: str
    served: list[Timing] = field(default_factory=list)
    """Per turn: from the request to the first text; CPU time of the model's thread from the start of the turn."""
    embedded: list[Timing] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Of the process after each turn, in bytes."""

    @property
    def memory_growth(self) -> int:
        """Growth in the second half of the turns, in bytes."""
        return self.memory[-1] - self.memory[len(self.memory) // 2]

    @property
    def memory_slope(self) -> float:
        """Bytes per 100 turns in the second half, by linear regression."""
        half = self.memory[len(self.memory) // 2 :]
        return 100 * statistics.linear_regression(range(len(half)), half).slope if len(half) > 1 else 0.0


@dataclass
class Dropping(_Result):
    """A client that sends its system prompt and its newest messages each time."""

    turns: int
    template: int
    """Tokens of the chat template around a message that is not the first one."""
    template_text: str
    others: int = 0
    """Most tokens that a request prefilled besides its message and those, by its usage."""
    uncounted: int = 0
    """Most tokens that the model was fed for a request, up to the first token of the reply, besides its usage."""


@dataclass
class Switching(_Result):
    """Many sessions in turn on one seat, with full caches."""

    sessions: int
    times: list[SwitchTime]
    memory_growth: int
    """Of the process from the first round to the last, in bytes."""


@dataclass
class Slice(_Result):
    """Two replies at a time, with slices of some length."""

    steps: int
    """Forward passes per slice."""
    alone: list[Timing] = field(default_factory=list)
    """Per token of one reply after the other, just before."""
    both: list[Timing] = field(default_factory=list)
    """Per token of two replies at a time."""
    later_first_s: list[float] = field(default_factory=list)
    """Time to the first text of the later of the two."""

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of two at a time over those of one after the other, of each pair."""
        return [alone.elapsed_s / both.elapsed_s for alone, both in zip(self.alone, self.both, strict=True)]

    @property
    def cpu(self) -> list[float]:
        """CPU time of two at a time over that of one after the other, of each pair."""
        return [both.cpu_s / alone.cpu_s for alone, both in zip(self.alone, self.both, strict=True)]


class Bench:
    """Measures the server, each time with a new store.

    Args:
        configuration: Settings and their origins, for messages.
        progress: Reports the progress.
        sizes: How much to measure.
        client: Name of the client that leads one conversation; '' for the best one that is installed.
    """

    def __init__(self, configuration: Configuration, progress: Progress, sizes: Sizes, client: str) -> None:
        self._configuration, self._progress, self._sizes, self._client = configuration, progress, sizes, client
        self._loaded: LoadedModel | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model that was measured."""
        assert self._loaded is not None
        return self._loaded

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

    def turns(self) -> Turns:
        """Alternate between a turn of the server and one of an embedded conversation, with the same messages."""
        with self._serving(2) as (server, _):
            client = client_named(self._client, server.port, server.model.info.name)
            found, first_cpu, own = Turns(client.name), _FirstCpu(server), _Embedded(server)
            previous: str | None = None
            for turn in range(self._sizes.turns):
                self._progress(f"Turn {turn + 1} of {self._sizes.turns}")
                text = QUESTIONS[turn % len(QUESTIONS)]
                timed = client.respond(text, previous, REPLY_TOKENS)
                found.served.append(Timing(timed.first_s, first_cpu.seconds))
                found.embedded.append(Timing(own.first_s(text), first_cpu.seconds))
                previous = timed.id
                found.memory.append(process_rss())
            own.close()
            client.close()
        return found

    def dropping(self) -> Dropping:
        """Lead a conversation as a client that drops its oldest messages."""
        history: list[dict[str, str]] = []
        system = {"role": "system", "content": "You are a keeper of a lighthouse. Answer in one sentence."}
        with self._serving(2) as (server, client):
            conversation = server.model.live.seats[0].conversation
            encoder = conversation.encoder
            fed_before_reply = _FedBeforeReply(server)
            found = Dropping(max(1, self._sizes.turns * 2 // 5), *_template_tokens(conversation))
            for turn in range(found.turns):
                self._progress(f"Turn {turn + 1} of {found.turns} of a client that drops messages")
                message = {"role": "user", "content": f"{turn}: {QUESTIONS[turn % len(QUESTIONS)]}"}
                with counted_tokens() as fed:
                    fed_before_reply.fed = fed
                    reply, prefilled = client.complete([system, *history, message], REPLY_TOKENS)
                if turn:
                    found.others = max(found.others, prefilled - len(encoder.turn(message["content"], first=False)))
                    found.uncounted = max(found.uncounted, fed_before_reply.count - prefilled)
                history = [*history, message, {"role": "assistant", "content": reply}][-KEPT_MESSAGES:]
        return found

    # --- many conversations -----------------------------------------------------------------------------------

    def switching(self) -> Switching:
        """Switch between sessions with full caches, in turn."""
        count, rounds = self._sizes.sessions, self._sizes.rounds
        with self._serving(1) as (server, client):
            ids = []
            long = " ".join(QUESTIONS) * max(1, self._configuration.settings.cache_size // 300)
            for number in range(count):
                self._progress(f"Session {number + 1} of {count}")
                ids.append(client.respond(f"{number}: {long}", None, 2).id)
            server.model.live.switch_times.clear()
            times, memory = list[SwitchTime](), list[int]()
            for _ in range(rounds):
                for number, id_ in enumerate(ids):
                    self._progress(f"Switch to session {number + 1} of {count}")
                    ids[number] = client.respond("Go on.", id_, 2).id
                memory.append(process_rss())
                times += server.model.live.switch_times
                server.model.live.switch_times.clear()
        return Switching(count, times, memory[-1] - memory[0])

    def slices(self) -> list[Slice]:
        """Compare two replies at a time with one after the other, for slices of several lengths."""
        found = [Slice(steps) for steps in SLICES]
        with self._serving(2) as (server, client):
            self._one_by_one(client)  # warms up
            for round_ in range(self._sizes.rounds):
                self._progress(f"Slices, round {round_ + 1} of {self._sizes.rounds}")
                for each in found[::-1] if round_ % 2 else found:
                    each.alone.append(self._timed(partial(self._one_by_one, client)))
                    server.model.scheduler.max_steps = each.steps
                    first: list[float] = []
                    each.both.append(self._timed(partial(self._at_once, client, first)))
                    each.later_first_s.append(max(first))
        return found

    def _timed(self, work: Callable[[], object]) -> Timing:
        """Return the time of two long replies, per token."""
        started, cpu = time.perf_counter(), time.process_time()
        work()
        elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Timing(elapsed / 2 / self._sizes.tokens, cpu / 2 / self._sizes.tokens)

    def _long(self, client: ApiClient) -> float:
        return client.respond(QUESTIONS[0], None, self._sizes.tokens, store=False).first_s

    def _one_by_one(self, client: ApiClient) -> None:
        for _ in range(2):
            self._long(client)

    def _at_once(self, client: ApiClient, first_s: list[float]) -> None:
        """Let two clients get a long reply at the same time; add the times to their first texts to `first_s`."""
        threads = [threading.Thread(target=lambda: first_s.append(self._long(client))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _template_tokens(conversation: Any) -> tuple[int, str]:
    """Return the number of tokens of the chat template around a message, and these tokens as text."""
    encoded = conversation.encoder.encoded("a", False)
    length = len(conversation.encoder.text("a"))
    start = encoded.message_start
    around = [*encoded.prompt[:start], *encoded.prompt[start + length :]]
    names = [conversation.tokenizer.decode([token]).replace("\n", "⏎").replace(" ", "␠") for token in around]
    return len(around), " ".join([*names[:start], "…", *names[start:]])


class _FirstCpu:
    """CPU time of the model's thread from the start of a turn to its first text, of the latest turn of all sessions."""

    def __init__(self, server: Any) -> None:
        self._inner = server.model.observe
        self._started = 0.0
        self._is_over = True
        self.seconds = 0.0
        server.model.observe = self._observe

    def _observe(self, session: KnownSession, event: ev.Event) -> None:
        if isinstance(event, ev.TurnStarted):
            self._started, self._is_over = time.thread_time(), False
        elif isinstance(event, ev.TextDelta | ev.TurnFinished) and not self._is_over:
            self.seconds, self._is_over = time.thread_time() - self._started, True
        self._inner(session, event)


class _FedBeforeReply:
    """The tokens that were fed when the latest prompt was prefilled."""

    def __init__(self, server: Any) -> None:
        self._inner = server.model.observe
        self.fed = FedTokens()
        self.count = 0
        server.model.observe = self._observe

    def _observe(self, session: KnownSession, event: ev.Event) -> None:
        if isinstance(event, ev.PrefillProgress):
            self.count = self.fed.count
        self._inner(session, event)


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
        """Return the time from the message to the first text of its reply, or to its end if it is empty."""
        call = Call(Prompt(text), lambda news: None)
        started = time.perf_counter()
        self._first = 0.0
        self._server.model.scheduler.call(lambda: self._seat.run(call, text, {"max_new_tokens": REPLY_TOKENS}, ()))
        return (self._first or time.perf_counter()) - started

    def close(self) -> None:
        """End the conversation."""
        self._server.model.scheduler.call(self._seat.close)

    def _note(self, event: ev.Event) -> None:
        if isinstance(event, ev.TextDelta) and not self._first:
            self._first = time.perf_counter()
