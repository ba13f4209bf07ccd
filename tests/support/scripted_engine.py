"""A `ChatEngine` without a model: scripted replies on a thread of its own, for tests of the app and the prompt.

It keeps the promises of `streamchat.engine.protocol` and emits the events of `streamchat.base.events` in the order in
which the real engine does: loading, turns, prefill, evictions, deltas, samples, failures. A token is a word with the
space that follows it. Nothing sleeps unless a rate is asked for; a test that must see a moment holds it
(`Reply.hold_after`, `hold_loading`) and lets go with `release()`.

    engine = ScriptedEngine(["Hello!", Reply("a slow one", tokens_per_s=20)])
    engine.subscribe(events.append)
    engine.start()
    engine.send(Submit("hi"))
    assert engine.wait_idle()
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, assert_never

from streamchat.base import events as ev
from streamchat.base import requests as rq
from streamchat.base.errors import ModelNotFoundError
from streamchat.base.progress import Progress
from streamchat.config.settings import Settings, default_of
from streamchat.engine.fetcher import Fetcher
from tests.support.scripted_cache import ScriptedCache

HEADER_TOKENS = 4
"""Tokens that the pretended chat template adds to a message."""
RSS_BYTES = 612_000_000


@dataclass(frozen=True)
class Reply:
    """What the engine answers to one message."""

    text: str = "A scripted reply."
    tokens_per_s: float | None = None
    """Rate of this reply; None = the engine's, 0 = as fast as possible."""
    finish_reason: ev.FinishReason = "stop"
    """'stop' or 'length'; 'cancelled' comes from `Stop`, 'error' from `error`."""
    error: str = ""
    """The turn fails with this sentence after `text` was streamed, and is rolled back."""
    hold_after: int | None = None
    """Wait for `release()` (or a stop) once so many tokens were streamed; 0 = before the first."""
    hold_prefill: bool = False
    """Wait for `release()` (or a stop) half-way through reading the prompt."""
    prompt_tokens: int | None = None
    """Pretend that the message has so many tokens; None = count them."""


class ScriptedEngine:
    """A `ChatEngine` that answers from a script.

    Args:
        replies: One answer a message, in order; or a function of the message. When used up, the message is echoed.
        settings: As the real engine's; `cache_size` and `num_sink_tokens` drive the evictions.
        tokens_per_s: Rate of replies that name none; 0 = as fast as possible.
        loading: The `ModelLoading` events before `ModelReady`; None = two steps with bytes.
        hold_loading: Wait for `release()` before `ModelReady`.
        load_failure: Ends loading with this instead of `ModelReady`.
        info: Changes to the `ModelInfo`, such as `{"name": "pythia-410m", "device": "cuda:0"}`.
        stuck: Ignores stop and close while a reply runs, as a thread inside a long kernel does.
        sample_s: Pause between `StatusSampled` while idle; 0 = none while idle.
        hold_fetch: A fetch waits half-way for `release_fetch()` or a cancellation.
        speed: (time to first token, tokens a second) to tell instead of the real ones, for pictures.
    """

    def __init__(
        self,
        replies: Iterable[Reply | str] | Callable[[str], Reply | str] = (),
        *,
        settings: Settings | None = None,
        tokens_per_s: float = 0.0,
        loading: Iterable[ev.ModelLoading] | None = None,
        hold_loading: bool = False,
        load_failure: ev.EngineFailed | None = None,
        info: dict[str, Any] | None = None,
        stuck: bool = False,
        sample_s: float = 1.0,
        hold_fetch: bool = False,
        speed: tuple[float, float] | None = None,
    ) -> None:
        self._settings = settings or Settings(cache_size=1024)
        self._script = replies if callable(replies) else iter(list(replies))
        self._tokens_per_s = tokens_per_s
        self._loading = list(loading) if loading is not None else _default_loading()
        self._hold_loading = hold_loading
        self._load_failure = load_failure
        self._info_changes = info or {}
        self._stuck = stuck
        self._sample_s = sample_s
        self._told_speed = speed

        self.pretended_server = ""
        self.origins: dict[str, str] = {}
        """What `origin` says about the settings that are not defaults."""
        self.sent: list[rq.Request] = []
        """Every request of the front end, in order."""
        self.events: list[ev.Event] = []
        """Every event emitted, in order."""

        self._sinks: list[Callable[[ev.Event], None]] = []
        self._lock = threading.RLock()
        self._told = threading.Condition()
        self._requests: queue.Queue[Callable[[], object]] = queue.Queue()
        self._pending = 0
        self._release = threading.Event()
        self._stop = threading.Event()
        self._closing = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._running = False
        self._failed = False
        self._closed_told = False
        self._thread: threading.Thread | None = None
        self._turn = 0
        self._said: list[tuple[str, str]] = []
        self.summary = "They spoke of the sea."
        """What `Compact` answers."""
        self.sessions: dict[str, list[tuple[str, str]]] = {}
        """What `OpenSession` knows: turns by id."""
        self._hold_fetch = hold_fetch
        self._release_fetch = threading.Event()
        self._fetcher = Fetcher(self._do_fetch, self.emit)
        self._speed: tuple[float | None, float | None] = (None, None)
        system_tokens = len(tokens_of(self._settings.system_prompt))
        self.cache = ScriptedCache(self._settings.cache_size, self._settings.num_sink_tokens, system_tokens)

    # --- the protocol -------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    def origin(self, name: str) -> str:
        """Where the value of a setting came from."""
        return self.origins.get(name, "the default")

    @property
    def busy(self) -> bool:
        """A turn is running or queued."""
        return self._pending > 0

    @property
    def server(self) -> str:
        """The server that it pretends to be attached to."""
        return self.pretended_server

    def subscribe(self, sink: Callable[[ev.Event], None]) -> Callable[[], None]:
        """Call `sink` with every event from now on; returns a function that ends it."""
        with self._lock:
            self._sinks.append(sink)

        def unsubscribe() -> None:
            with self._lock:
                if sink in self._sinks:
                    self._sinks.remove(sink)

        return unsubscribe

    def start(self) -> None:
        """Start the thread and load."""
        if self._thread is None and not self._closing.is_set():
            self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)
            self._thread.start()

    def send(self, request: rq.Request) -> None:
        """Queue a request; `Stop` and those of a fetch take effect at once."""
        self.sent.append(request)
        match request:
            case rq.Stop():
                if self._running:
                    self._stop.set()
                return
            case rq.FetchModel(name):
                self._fetcher.start(name)
                return
            case rq.CancelFetch():
                self._fetcher.cancel()
                return
            case rq.SetSystemPrompt(text):
                self._settings = replace(self._settings, system_prompt=text)
            case rq.SetOption(name, value):
                changed: dict[str, Any] = {name: value}
                self._settings = replace(self._settings, **changed)
                self.origins[name] = "/set"
            case rq.ResetOption(name):
                default: dict[str, Any] = {name: default_of(name)}
                self._settings = replace(self._settings, **default)
                self.origins.pop(name, None)
            case rq.Submit() | rq.Retry() | rq.Edit() | rq.Quote():
                with self._lock:
                    self._pending += 1
                    self._idle.clear()
            case _:
                pass
        self._requests.put(lambda: self._do(request))

    def _do(self, request: rq.Request) -> None:
        match request:
            case rq.Submit(text):
                self._do_turn(text)
            case rq.Retry():
                self._do_replace(None)
            case rq.Edit(text):
                self._do_replace(text)
            case rq.Quote(text, reply, pin):
                self._do_quote(text, reply, pin)
            case rq.Compact():
                self.emit(ev.SummaryReady(self.summary, (1, 2) if self.summary else (0, 0)))
            case rq.Undo(to_edit):
                self._do_undo(to_edit=to_edit)
            case rq.Rewind(turn):
                self._do_rewind(turn)
            case rq.Fork(turn):
                self._do_fork(turn or self._turn)
            case rq.Clear() | rq.SetSystemPrompt():
                self._do_clear()
            case rq.SetOption(name, value):
                self.emit(ev.SettingChanged(name, value))
            case rq.ResetOption(name):
                self.emit(ev.SettingChanged(name, default_of(name)))
            case rq.Pin(turn):
                self._do_pin(turn, True)
            case rq.Unpin(turn):
                self._do_pin(turn, False)
            case rq.SwitchModel(name):
                self._do_switch(name)
            case rq.CountTokens(text):
                self.emit(ev.TextCounted(text, len(tokens_of(text))))
            case rq.SetTitle(text):
                self.emit(ev.Notice(f"title changed to “{' '.join(text.split())}”"))
            case rq.OpenSession(session):
                self._do_resume(session)
            case rq.Save():
                self.emit(ev.SessionOpened("saved1"))
            case rq.Stop() | rq.FetchModel() | rq.CancelFetch():
                pass
            case _:
                assert_never(request)

    @property
    def saving(self) -> bool:
        """Nothing is saved."""
        return False

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop everything and end the thread; returns whether it ended in time."""
        self._fetcher.cancel()
        self._closing.set()
        self._requests.put(lambda: None)
        if self._thread is None:
            self._tell_closed()
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- what a test does ---------------------------------------------------------------------------------------

    @property
    def submitted(self) -> list[str]:
        """Texts of the messages, in order."""
        return [request.text for request in self.sent if isinstance(request, rq.Submit)]

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    def release(self) -> None:
        """Let the held moment (loading or reply) go on."""
        self._release.set()

    def release_fetch(self) -> None:
        """Let the held fetch go on."""
        self._release_fetch.set()

    def fail(self, message: str, *, title: str = "The engine failed", exit_code: int = 1) -> None:
        """Let the engine fail for good at its next step."""
        self._requests.put(lambda: self._do_fail(ev.EngineFailed(title, message, exit_code, "Traceback: scripted")))

    def emit(self, event: ev.Event) -> None:
        """Send `event` to all subscribers on the calling thread."""
        with self._lock:
            sinks = list(self._sinks)
        for sink in sinks:
            sink(event)
        with self._told:
            self.events.append(event)
            self._told.notify_all()

    def wait_idle(self, timeout_s: float = 10.0) -> bool:
        """Wait until no turn is running or queued; returns whether that came in time."""
        return self._idle.wait(timeout_s)

    def wait_event(self, kind: type[ev.Event], count: int = 1, timeout_s: float = 10.0) -> bool:
        """Wait until `count` events of that kind were emitted in all; returns whether that came in time."""

        def enough() -> bool:
            return sum(isinstance(event, kind) for event in self.events) >= count

        with self._told:
            return self._told.wait_for(enough, timeout_s)

    # --- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._do_load()
            while not self._closing.is_set() and not self._failed:
                try:
                    request = self._requests.get(timeout=self._sample_s or None)
                except queue.Empty:
                    self._sample()
                    continue
                request()
        finally:
            self._tell_closed()

    def _do_load(self) -> None:
        for event in self._loading:
            self.emit(event)
        if self._hold_loading:
            self._hold(until_stop=False)
        if self._closing.is_set():
            return
        if self._load_failure is not None:
            self._do_fail(self._load_failure)
            return
        self.emit(ev.ModelReady(self._info(), load_s=1.9))
        self._sample()

    def _do_fail(self, event: ev.EngineFailed) -> None:
        self._failed = True
        with self._lock:
            self._pending = 0
        self._idle.set()
        self.emit(event)

    def _do_clear(self) -> None:
        self.cache = self.cache.fresh(len(tokens_of(self._settings.system_prompt)))
        self._turn, self._said = 0, []
        self._speed = (None, None)
        self.emit(ev.ConversationCleared(self._settings.system_prompt, self.cache.system_tokens))
        self._sample()

    def _do_turn(self, text: str, reply: Reply | None = None) -> None:
        self._stop.clear()
        self._running = True
        try:
            self._turn_body(text, reply or self._next_reply(text))
        finally:
            self._running = False
            self._answered()
        self._sample()

    def _answered(self) -> None:
        with self._lock:
            self._pending = max(0, self._pending - 1)
            if not self._pending:
                self._idle.set()

    def _turn_body(self, text: str, reply: Reply) -> None:
        started = time.perf_counter()
        turn = self._turn + 1
        prompt = reply.prompt_tokens if reply.prompt_tokens is not None else len(tokens_of(text)) + HEADER_TOKENS
        self._speed = (None, None)
        self.emit(ev.TurnStarted(turn, text, prompt))
        room = self.cache.room
        self.cache.mark()
        self._evict(min(prompt, room), "between_turns", min(self._settings.max_new_tokens, room // 4))
        self._record = self.cache.begin(text, prompt)
        if not self._prefill(turn, prompt, reply):
            self._finish(turn, text, prompt, [], "cancelled", started, None)
            return
        first_at: float | None = None
        shown: list[str] = []
        rate = self._tokens_per_s if reply.tokens_per_s is None else reply.tokens_per_s
        sampled = started
        limit = self._settings.max_new_tokens
        reason: ev.FinishReason = reply.finish_reason
        for index, token in enumerate(tokens_of(reply.text)):
            if reply.hold_after == index:
                self._sample()
                self._hold()
            if rate:
                self._pause(1 / rate)
            if self._interrupted():
                reason = "cancelled"
                break
            if index >= limit:
                reason = "length"
                break
            self._evict(1, "decode")
            self.cache.append(1)
            now = time.perf_counter()
            first_at = first_at or now
            shown.append(token)
            self.emit(ev.TextDelta(turn, token))
            self._speed = (first_at - started, _rate(len(shown), now - first_at))
            if now - sampled > 0.2 and not self._told_speed:
                sampled = now
                self._sample()
        if reply.error:
            self._finish(turn, text, prompt, shown, "error", started, first_at, reply.error)
            return
        self._finish(turn, text, prompt, shown, reason, started, first_at)

    def _prefill(self, turn: int, prompt: int, reply: Reply) -> bool:
        """Read the prompt in chunks, evicting in between; returns False when stopped."""
        chunk = max(1, min(64, self.cache.room))
        done = 0
        while done < prompt:
            step = min(chunk, prompt - done)
            self._evict(step, "prefill")
            self.cache.append(step)
            done += step
            self.emit(ev.PrefillProgress(turn, done, prompt))
            if reply.hold_prefill and done >= prompt // 2:
                self._sample()
                self._hold()
                reply = replace(reply, hold_prefill=False)
            if self._interrupted():
                return False
        if reply.hold_after == 0:
            self._sample()
            self._hold()
        return not self._interrupted()

    def _finish(
        self,
        turn: int,
        text: str,
        prompt: int,
        shown: list[str],
        reason: ev.FinishReason,
        started: float,
        first_at: float | None,
        message: str = "",
    ) -> None:
        rolled_back = reason == "error" or (reason == "cancelled" and not shown)
        if rolled_back:
            self.cache.take_back()
        else:
            self._turn = turn
            self._said.append((text, "".join(shown)))
            self.cache.end(self._record)
        now = time.perf_counter()
        cache = self.cache.state()
        ttft_s = first_at - started if first_at is not None else None
        decode_tps = _rate(len(shown), now - first_at) if first_at is not None else None
        if self._told_speed and first_at is not None:
            ttft_s, decode_tps = self._told_speed
        self._speed = (ttft_s, decode_tps)
        stats = ev.TurnStats(
            turn=turn,
            prompt_tokens=prompt,
            new_tokens=len(shown),
            cache_len=cache.length,
            cache_size=cache.cache_size,
            compressions=cache.compressions,
            tokens_evicted=cache.tokens_evicted,
            ttft_s=ttft_s,
            decode_tps=decode_tps,
            kv_bytes=cache.kv_bytes,
            rss_bytes=RSS_BYTES,
            vram_bytes=self._memory().allocated_bytes,
            finish_reason=reason,
        )
        self.emit(ev.TurnFinished(stats, reason, "".join(shown), text, rolled_back, message))

    def _evict(self, incoming: int, trigger: ev.Trigger, reserve: int = 0) -> None:
        event = self.cache.make_room(incoming, reserve, trigger)
        if event is not None:
            self.emit(event)

    def _do_pin(self, turn: int, pinned: bool) -> None:
        tokens = self.cache.set_pin(turn, pinned)
        if tokens:
            self.emit(ev.TurnPinned(turn, pinned, tokens, self.cache.state()))
        else:
            self.emit(ev.Notice(f"turn {turn} cannot be pinned: it was evicted from the cache", "warning"))

    def _do_undo(self, *, to_edit: bool = False, replaced: bool = False) -> str | None:
        if not self._turn:
            self.emit(ev.Notice("nothing to undo yet", "warning"))
            return None
        text, reply = self._said.pop()
        self.cache.take_back()
        self._turn -= 1
        self.emit(ev.TurnUndone(self._turn + 1, text, reply, self.cache.state(), replaced=replaced, to_edit=to_edit))
        self._sample()
        return text

    def _do_rewind(self, turn: int) -> None:
        if not 0 < turn < self._turn:
            self.emit(ev.Notice(f"turn {turn} is the newest one, so there is nothing to rewind", "warning"))
            return
        self.sessions["later1"] = list(self._said)
        count = self._turn - turn
        for _ in range(count):
            self._do_undo(replaced=True)
        self.emit(ev.ConversationRewound(turn, count, "later1", True, 12, 0, 0.004, self.cache.state()))

    def _do_fork(self, turn: int) -> None:
        self.sessions["forked"] = self._said[:turn]
        self._do_resume("forked", "saved1", turn)

    def _do_replace(self, text: str | None) -> None:
        before = self._do_undo(replaced=True)
        if before is None:
            self._answered()
            return
        text = before if text is None else text
        self._do_turn(text, self._next_reply(text))

    def _do_quote(self, text: str, reply: str, pin: bool) -> None:
        self._do_turn(text, Reply(reply))
        if pin:
            self._do_pin(self._turn, True)

    def _do_resume(self, session: str, parent: str = "", parent_turn: int = 0) -> None:
        if session not in self.sessions:
            self.emit(ev.Notice(f"no saved session has the id {session!r}", "error"))
            return
        turns = self.sessions[session]
        self._do_clear()
        for number, (text, reply) in enumerate(turns, 1):
            self.cache.mark()
            record = self.cache.begin(text, len(tokens_of(text)) + HEADER_TOKENS)
            self.cache.append(len(tokens_of(text)) + HEADER_TOKENS + len(tokens_of(reply)))
            self.cache.end(record)
            self._turn, self._said = number, [*self._said, (text, reply)]
        saved = tuple(ev.SavedTurn(i, text, reply, 8, 5, 0.1, 20.0) for i, (text, reply) in enumerate(turns, 1))
        self.emit(ev.SessionOpened(session))
        self.emit(
            ev.ConversationResumed(
                *(session, saved[0].text, saved, self.cache.state(), self._info(), self._settings.system_prompt, 0.2),
                parent=parent,
                parent_turn=parent_turn,
            )
        )
        self._sample()

    def _do_switch(self, name: str) -> None:
        self.emit(ev.ModelLoading(f"Loading {name}", 1, 2))
        if name == "missing":
            self.emit(ev.Notice("missing is not a model; keeping the current model", "error"))
            return
        self._info_changes["name"] = name
        self._do_clear()
        self.emit(ev.ModelReady(self._info(), load_s=0.5))
        self._sample()

    def _do_fetch(self, name: str, progress: Progress) -> None:
        if "missing" in name:
            raise ModelNotFoundError(f"{name} is not a model")
        progress(f"Fetching {name}", 0, 911_000_000, "bytes")
        while self._hold_fetch and not self._release_fetch.wait(0.01):
            progress(f"Fetching {name}", 455_500_000, 911_000_000, "bytes")
        progress(f"Fetching {name}", 911_000_000, 911_000_000, "bytes")

    # --- small things -------------------------------------------------------------------------------------------

    def _next_reply(self, text: str) -> Reply:
        if callable(self._script):
            reply = self._script(text)
        else:
            reply = next(self._script, f"You said: {text}")
        return Reply(reply) if isinstance(reply, str) else reply

    def _interrupted(self) -> bool:
        return not self._stuck and (self._stop.is_set() or self._closing.is_set())

    def _hold(self, until_stop: bool = True) -> None:
        while not self._release.wait(0.01):
            if self._stuck:
                continue
            if self._closing.is_set() or (until_stop and self._stop.is_set()):
                return
        self._release.clear()

    def _pause(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0 and not self._interrupted():
            self._stop.wait(min(left, 0.05))

    def _info(self) -> ev.ModelInfo:
        info = ev.ModelInfo(
            name="SmolLM2-135M-Instruct",
            source="a scripted engine",
            device="cpu",
            dtype="float32",
            parameters=134_515_008,
            weight_bytes=538_060_032,
            context_length=8192,
            cache_size=self._settings.cache_size,
            num_sink_tokens=self._settings.num_sink_tokens,
            pinned_tokens=self.cache.system_tokens,
            attention=self._settings.attention,
            chat_format="template",
        )
        return replace(info, **self._info_changes)

    def _memory(self) -> ev.MemoryState:
        device = str(self._info_changes.get("device", "cpu"))
        if device == "cpu":
            return ev.MemoryState(RSS_BYTES)
        return ev.MemoryState(RSS_BYTES, device, 1_240_000_000, 1_510_000_000, 25_400_000_000)

    def _sample(self) -> None:
        ttft_s, decode_tps = self._speed
        self.emit(ev.StatusSampled(self.cache.state(), self._memory(), ttft_s, decode_tps, self._running))

    def _tell_closed(self) -> None:
        with self._lock:
            if self._closed_told:
                return
            self._closed_told = True
            self._pending = 0
        self._idle.set()
        self.emit(ev.EngineClosed())


def tokens_of(text: str) -> list[str]:
    """Words with the space that follows them; joined they are `text`."""
    return re.findall(r"\s*\S+\s*", text) if text.strip() else ([text] if text else [])


def _rate(tokens: int, seconds: float) -> float | None:
    return (tokens - 1) / seconds if tokens > 1 and seconds > 0 else None


def _default_loading() -> list[ev.ModelLoading]:
    name = "SmolLM2-135M-Instruct"
    return [
        ev.ModelLoading(f"Fetching {name}", 46_500_000, 92_900_000, "bytes"),
        ev.ModelLoading(f"Loading {name}", 1, 2),
    ]
