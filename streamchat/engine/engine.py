"""The engine: one thread that owns model and cache, a queue of requests in, a stream of events out."""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from streamchat.base import events as ev
from streamchat.base.errors import OUT_OF_MEMORY, ExitCode, StreamchatError
from streamchat.base.sanitize import encodable
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.engine.owner import Owner
from streamchat.sessions.archive import OpenStore

_log = logging.getLogger(__name__)

IDLE_INTERVAL_S = 1.0
SAVING_S = 60.0
"""How much longer `close` waits while the cache is written to the disk."""


@dataclass
class _Turn:
    text: str | None
    """None = retry the last message."""
    replacing: bool = False
    """Undo the newest turn first."""
    reply: str | None = None
    """Reply supplied by the caller (not generated)."""
    pin: bool = False
    summary: bool = False
    """Summarize the turns to be evicted next, without adding a turn."""
    cancel: threading.Event = field(default_factory=threading.Event)


class _Closing(Exception):
    """Loading was interrupted because the engine is closing."""


class Engine:
    """Implements `ChatEngine`. All methods may be called from any thread and return at once.

    Args:
        configuration: Settings and their origins, for messages.
        load: Loads the model; replaceable for tests.
        open_store: Opens the store of saved sessions; None saves nothing.
        session: The saved session to resume; None starts a new one.
        agreed_model: The model that the user agreed to load for it, if only an imported file named it.
        audit: Emit `CacheAudited` with every event that may change the cache.
    """

    def __init__(
        self,
        configuration: Configuration,
        load: Load = load_from_settings,
        *,
        open_store: OpenStore | None = None,
        session: str | None = None,
        agreed_model: str = "",
        audit: bool = False,
    ) -> None:
        publish: Callable[[ev.Event], None] = self._emit
        if audit:
            from streamchat.conversation.audit import Auditor

            publish = Auditor(self._emit, lambda: self._owner.conversation)
        self._owner = Owner(configuration, load, publish, self._progress, open_store)
        self._session, self._agreed_model = session, agreed_model
        self._sinks: list[Callable[[ev.Event], None]] = []
        self._requests: queue.SimpleQueue[_Turn | Callable[[], None] | None] = queue.SimpleQueue()
        self._turns: list[_Turn] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streamchat-engine", daemon=True)

    # --- requests, from any thread ----------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The current settings."""
        return self._owner.settings

    @property
    def busy(self) -> bool:
        """Whether a turn is running or queued."""
        with self._lock:
            return bool(self._turns)

    @property
    def saving(self) -> bool:
        """Whether the cache is being written to the disk; closing waits for it."""
        return self._owner.archive.saving.is_set()

    def subscribe(self, sink: Callable[[ev.Event], None]) -> Callable[[], None]:
        """Call `sink` with every event, on the engine's thread; return a function that unsubscribes it."""
        self._sinks.append(sink)

        def unsubscribe() -> None:
            if sink in self._sinks:
                self._sinks.remove(sink)

        return unsubscribe

    def publish(self, event: ev.Event) -> None:
        """Emit an event to all subscribers, on the caller's thread."""
        self._emit(event)

    def start(self) -> None:
        """Start loading the model."""
        self._thread.start()

    def submit(self, text: str) -> None:
        """Queue a user message."""
        self._queue(_Turn(encodable(text)))

    def retry(self) -> None:
        """Undo the newest turn and reply to its message again."""
        self._queue(_Turn(None, replacing=True))

    def edit(self, text: str) -> None:
        """Undo the newest turn and send `text` instead."""
        self._queue(_Turn(encodable(text), replacing=True))

    def quote(self, text: str, reply: str, pin: bool) -> None:
        """Run a turn with a given reply, and pin it if `pin`."""
        self._queue(_Turn(encodable(text), reply=encodable(reply), pin=pin))

    def _queue(self, turn: _Turn) -> None:
        with self._lock:
            self._turns.append(turn)
        self._requests.put(turn)

    def undo(self, to_edit: bool = False) -> None:
        """Undo the newest turn."""
        self._requests.put(lambda: self._owner.undo_as_asked(to_edit))

    def compact(self) -> None:
        """Summarize the turns to be evicted next."""
        self._queue(_Turn(None, summary=True))

    def open_session(self, session: str, agreed_model: str = "") -> None:
        """Resume a saved session."""
        self._requests.put(lambda: self._owner.open_session(session, agreed_model))

    def stop_reply(self) -> None:
        """Stop the running turn, or cancel the first queued one."""
        with self._lock:
            if self._turns:
                self._turns[0].cancel.set()

    def clear(self) -> None:
        """Clear the conversation."""
        self._requests.put(self._owner.start_over)

    def set_system_prompt(self, text: str) -> None:
        """Start over with another system prompt."""
        self._requests.put(lambda: self._owner.start_over(system_prompt=encodable(text)))

    def set_option(self, name: str, value: Any) -> None:
        """Change a live setting from the next turn on."""
        self._requests.put(lambda: self._owner.set_option(name, value))

    def pin(self, turn: int) -> None:
        """Pin a turn in the cache."""
        self._requests.put(lambda: self._owner.set_pin(turn, True))

    def unpin(self, turn: int) -> None:
        """Unpin a turn."""
        self._requests.put(lambda: self._owner.set_pin(turn, False))

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it."""
        self._requests.put(lambda: self._owner.switch_model(name))

    def count_tokens(self, text: str) -> None:
        """Count the tokens of a text."""
        self._requests.put(lambda: self._owner.count(text))

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop everything; return whether the thread ended in time. Waits longer while the cache is being saved."""
        self._closing.set()
        with self._lock:
            for turn in self._turns:
                turn.cancel.set()
        self._requests.put(None)
        if self._thread.ident is None:
            return True
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            if self._owner.archive.saving.is_set():
                self._thread.join(SAVING_S)
        return not self._thread.is_alive()

    # --- the owner's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._owner.start(self._session, self._agreed_model)
            self._owner.sample_status()
            self._serve()
        except _Closing:
            pass
        except StreamchatError as error:
            self._fail(error.title, str(error), error.exit_code)
        except MemoryError:
            self._fail("Out of memory", OUT_OF_MEMORY, ExitCode.MODEL)
        except BaseException as error:
            text = f"unexpected {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self._fail("The engine failed", text, ExitCode.FAILURE)
        finally:
            self._owner.end()
            self._emit(ev.EngineClosed())

    def _fail(self, title: str, message: str, exit_code: ExitCode) -> None:
        details = traceback.format_exc()
        _log.error("%s: %s\n%s", title, message, details)
        self._emit(ev.EngineFailed(title, message, int(exit_code), details))

    def _progress(self, stage: str, done: int, total: int, unit: str) -> None:
        if self._closing.is_set():
            raise _Closing
        self._emit(ev.ModelLoading(stage, done, total, "bytes" if unit == "bytes" else ""))

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                request = self._requests.get(timeout=IDLE_INTERVAL_S)
            except queue.Empty:
                self._owner.sample_status()
                continue
            if isinstance(request, _Turn):
                self._run_turn(request)
            elif request is not None:
                request()
                self._owner.sample_status()

    def _run_turn(self, turn: _Turn) -> None:
        def on_done() -> None:
            with self._lock:
                self._turns.remove(turn)

        if turn.summary:
            self._owner.compact(turn.cancel.is_set, on_done)
            return
        cancelled = turn.cancel.is_set
        if turn.replacing and not cancelled():
            self._owner.replace_turn(turn.text, cancelled, on_done=on_done)
        else:
            self._owner.run_turn(turn.text or "", cancelled, reply=turn.reply, pin=turn.pin, on_done=on_done)

    def _emit(self, event: ev.Event) -> None:
        for sink in list(self._sinks):
            try:
                sink(event)
            except Exception:
                _log.exception("a subscriber failed on %s", type(event).__name__)
