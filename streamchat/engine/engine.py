"""The engine: one owner thread for model and cache, one queue of requests in, one stream of events out."""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.errors import OUT_OF_MEMORY, ExitCode, StreamchatError
from streamchat.base.sanitize import encodable
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.engine.owner import Owner
from streamchat.sessions.archive import OpenStore

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.conversation import Conversation

_log = logging.getLogger(__name__)

IDLE_INTERVAL_S = 1.0
SAVING_S = 60.0
"""How much longer leaving waits where the cache is being written to the disk."""


@dataclass
class _Turn:
    text: str | None
    """None = the newest message once more."""
    replacing: bool = False
    """The newest turn is taken back first."""
    reply: str | None = None
    """Given, and not to be generated."""
    pin: bool = False
    summary: bool = False
    """No turn of the conversation: a summary of what would leave next."""
    cancel: threading.Event = field(default_factory=threading.Event)


class _Closing(Exception):
    """Loading was interrupted because the engine closes."""


class Engine:
    """Implements `ChatEngine`. All methods may be called from any thread and return at once.

    Args:
        configuration: Settings, and where they came from for messages.
        load: Gets the model; replaceable for tests.
        open_store: Opens the store of saved conversations; None saves nothing.
        session: The saved conversation to go on with; None begins a new one.
        agreed_model: The model that the user agreed to load for it, if only an imported file named that.
    """

    def __init__(
        self,
        configuration: Configuration,
        load: Load = load_from_settings,
        *,
        open_store: OpenStore | None = None,
        session: str | None = None,
        agreed_model: str = "",
    ) -> None:
        self._owner = Owner(configuration, load, self._emit, self._progress, open_store)
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
        """The settings in force."""
        return self._owner.settings

    @property
    def busy(self) -> bool:
        """A turn is running or queued."""
        with self._lock:
            return bool(self._turns)

    @property
    def saving(self) -> bool:
        """The cache is being written to the disk; leaving waits for that."""
        return self._owner.archive.saving.is_set()

    @property
    def conversation(self) -> Conversation | None:
        """What the engine's thread works on. For subscribers, which are called on that thread, and for nobody else."""
        return self._owner.conversation

    def subscribe(self, sink: Callable[[ev.Event], None]) -> Callable[[], None]:
        """Call `sink` with every event, on the engine's thread; returns a function that ends it."""
        self._sinks.append(sink)

        def unsubscribe() -> None:
            if sink in self._sinks:
                self._sinks.remove(sink)

        return unsubscribe

    def tell(self, event: ev.Event) -> None:
        """Say something to all subscribers, in the engine's name, on the caller's thread."""
        self._emit(event)

    def start(self) -> None:
        """Start loading the model."""
        self._thread.start()

    def submit(self, text: str) -> None:
        """Queue a user message."""
        self._queue(_Turn(encodable(text)))

    def retry(self) -> None:
        """Take the newest turn back and answer its message once more."""
        self._queue(_Turn(None, replacing=True))

    def edit(self, text: str) -> None:
        """Take the newest turn back and send `text` in its place."""
        self._queue(_Turn(encodable(text), replacing=True))

    def quote(self, text: str, reply: str, pin: bool) -> None:
        """Put a text before the model with a given reply, and keep it where `pin` says so."""
        self._queue(_Turn(encodable(text), reply=encodable(reply), pin=pin))

    def _queue(self, turn: _Turn) -> None:
        with self._lock:
            self._turns.append(turn)
        self._requests.put(turn)

    def undo(self, to_edit: bool = False) -> None:
        """Take the newest turn back."""
        self._requests.put(lambda: self._owner.undo_as_asked(to_edit))

    def compact(self) -> None:
        """Have the model sum up what would leave next."""
        self._queue(_Turn(None, summary=True))

    def open_session(self, session: str, agreed_model: str = "") -> None:
        """Go on with a saved conversation."""
        self._requests.put(lambda: self._owner.open_session(session, agreed_model))

    def stop_reply(self) -> None:
        """Stop the running turn, or take back the one that waits longest."""
        with self._lock:
            if self._turns:
                self._turns[0].cancel.set()

    def clear(self) -> None:
        """Forget the conversation."""
        self._requests.put(self._owner.start_over)

    def set_system_prompt(self, text: str) -> None:
        """Start over with another system prompt."""
        self._requests.put(lambda: self._owner.start_over(system_prompt=encodable(text)))

    def set_option(self, name: str, value: Any) -> None:
        """Change a live setting from the next turn on."""
        self._requests.put(lambda: self._owner.set_option(name, value))

    def pin(self, turn: int) -> None:
        """Keep this turn in the cache."""
        self._requests.put(lambda: self._owner.set_pin(turn, True))

    def unpin(self, turn: int) -> None:
        """Let this turn leave again."""
        self._requests.put(lambda: self._owner.set_pin(turn, False))

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it."""
        self._requests.put(lambda: self._owner.switch_model(name))

    def count_tokens(self, text: str) -> None:
        """Measure a text that may be sent."""
        self._requests.put(lambda: self._owner.count(text))

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop everything; returns whether the thread ended in time. A cache that is being saved gets more of it."""
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
            self._owner.begin(self._session, self._agreed_model)
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
                self._take_turn(request)
            elif request is not None:
                request()
                self._owner.sample_status()

    def _take_turn(self, turn: _Turn) -> None:
        def over() -> None:
            with self._lock:
                self._turns.remove(turn)

        if turn.summary:
            self._owner.compact(turn.cancel.is_set, over)
            return
        cancelled = turn.cancel.is_set
        if turn.replacing and not cancelled():
            self._owner.replace_turn(turn.text, cancelled, over=over)
        else:
            self._owner.run_turn(turn.text or "", cancelled, reply=turn.reply, pin=turn.pin, over=over)

    def _emit(self, event: ev.Event) -> None:
        for sink in list(self._sinks):
            try:
                sink(event)
            except Exception:
                _log.exception("a subscriber failed on %s", type(event).__name__)
