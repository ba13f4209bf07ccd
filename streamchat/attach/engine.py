"""The engine of an attached front end: sends requests to a server, and emits the events that come back."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from streamchat.attach.address import Address
from streamchat.attach.connection import AttachError, Connection
from streamchat.attach.frames import (
    FromServer,
    Hello,
    Numbered,
    Private,
    Received,
    State,
    request_text,
)
from streamchat.attach.pending import PendingRequests
from streamchat.attach.settings import SharedSettings, is_own
from streamchat.base import events as ev
from streamchat.base.formatting import human_bytes
from streamchat.base.requests import Request, ResetOption, SetOption, TurnRequest
from streamchat.base.wire import to_json
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.missing_turn import missing_turn

_log = logging.getLogger(__name__)
FIRST_WAIT_S, MAX_WAIT_S = 0.1, 5.0
"""The first and the longest pause between two attempts to connect again; each is twice the one before."""
SOON_S = 0.3
"""Time that a session may take to appear before the front end reports that it waits."""
RECEIVED_S = 0.5
"""How long leaving waits for the server to receive the last requests."""
ENVELOPE = 100
"""Bytes of a message in addition to its request."""


class AttachedEngine:
    """Implements `ChatEngine` for one front end of a server. All methods may be called from any thread.

    Args:
        address: The server.
        configuration: Settings of this front end.
        session: Id of the saved session to attach to, or the start of it; '' for the newest session.
        new: Attach to a new session.
        connect: Opens a connection; replaceable for tests.
    """

    def __init__(
        self,
        address: Address,
        configuration: Configuration,
        session: str = "",
        *,
        new: bool = False,
        connect: Callable[[Address, dict[str, str]], Connection] = Connection,
    ) -> None:
        self.address = address
        self._settings, self._connect = SharedSettings(configuration), connect
        self._id = secrets.token_hex(16)
        self.session = session
        """Id of the session, once there is a saved one."""
        self._is_new = new
        self._log_id, self._number = "", 0
        self.hello: Hello | None = None
        self._pending = PendingRequests()
        self._sinks: list[Callable[[ev.Event], None]] = []
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._messages: Iterator[FromServer] = iter(())
        self._closing = threading.Event()
        self._has_state = False
        self._lost_for, self._pause_s = "", FIRST_WAIT_S
        """Why the connection was lost ('' if it works), and the pause before the next attempt."""
        self._thread = threading.Thread(target=self._run, name="streamchat-attach", daemon=True)

    # --- ChatEngine -------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings of the session, and those of this front end's interface."""
        return self._settings.configuration.settings

    def origin(self, name: str) -> str:
        """Return the origin of a setting's value."""
        return self._settings.configuration.origin(name)

    @property
    def busy(self) -> bool:
        """Whether a turn of this front end is running or queued."""
        with self._lock:
            return self._pending.busy

    @property
    def saving(self) -> bool:
        """Always False: the server saves the session."""
        return False

    @property
    def server(self) -> str:
        """The address of the server."""
        return self.address.url

    def subscribe(self, sink: Callable[[ev.Event], None]) -> Callable[[], None]:
        """Call `sink` with every event; return a function that unsubscribes it."""
        self._sinks.append(sink)

        def unsubscribe() -> None:
            if sink in self._sinks:
                self._sinks.remove(sink)

        return unsubscribe

    def start(self) -> None:
        """Start to receive events; connect first if `connect` was not called."""
        self._thread.start()

    def send(self, request: Request) -> None:
        """Send a request, now or once the connection works again."""
        if isinstance(request, SetOption | ResetOption) and is_own(request.name):
            self._publish(self._settings.change(request))
            return
        if refusal := self._refusal(request):
            self._publish(refusal)
            return
        with self._lock:
            asked = self._pending.add(request)
            if self._connection is not None and self._has_state:
                self._connection.send(request_text(asked))

    def close(self, timeout_s: float = 2.0) -> bool:
        """Leave the session, which continues; return whether the thread ended in time."""
        self._wait_received()
        self._closing.set()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _wait_received(self) -> None:
        """Wait briefly until the server has received all requests."""
        deadline = time.monotonic() + RECEIVED_S
        while time.monotonic() < deadline and self._connection is not None and self._pending.unreceived():
            time.sleep(0.01)

    def _refusal(self, request: Request) -> ev.Event | None:
        """Return the event that refuses a request that is too long to send; None for other requests."""
        length, limit = len(to_json(request).encode()), 0 if self.hello is None else self.hello.max_request
        if not limit or length <= limit - ENVELOPE:
            return None
        why = f"the message has {human_bytes(length)}, and the server accepts {human_bytes(limit)}; send less"
        text = getattr(request, "text", "")
        return missing_turn(text, why) if isinstance(request, TurnRequest) else ev.Notice(why, "warning")

    @property
    def unsent(self) -> list[str]:
        """Messages that the server has not received."""
        with self._lock:
            return self._pending.unreceived_texts

    # --- the connection ---------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect, and wait for the first message of the server.

        Raises:
            AttachError: The server cannot be reached, or refuses.
        """
        query = {"client": self._id, "session": self.session, "new": "1" if self._is_new and not self.session else ""}
        if self._log_id:
            query |= {"log": self._log_id, "after": str(self._number)}
        connection = self._connect(self.address, query)
        messages = connection.read()
        try:
            first = next(messages, None)
        except AttachError:
            connection.close()
            raise
        if not isinstance(first, Hello):
            connection.close()
            raise AttachError(f"{self.address.url} closed the connection; try again")
        with self._lock:
            self.hello, self._connection, self._messages = first, connection, messages
            self._has_state = False
        if self._closing.is_set():
            connection.close()

    def _run(self) -> None:
        try:
            if self._connection is None:
                self.connect()
            while True:
                reason = self._receive()
                self._lose()
                if self._closing.is_set() or not self._connect_again(reason):
                    break
        except AttachError as error:
            self._publish(ev.EngineFailed(error.title, str(error), int(error.exit_code)))
        except Exception as error:
            _log.exception("the attached engine failed")
            self._publish(ev.EngineFailed("The connection failed", f"unexpected {type(error).__name__}: {error}", 1))
        finally:
            self._publish(ev.EngineClosed())

    def _receive(self) -> str:
        """Receive messages until the connection ends; return the reason.

        Raises:
            AttachError: The front end cannot be attached.
        """
        waiting = threading.Timer(SOON_S, self._say_waiting)
        waiting.daemon = True
        waiting.start()
        try:
            for message in self._messages:
                if self._closing.is_set():
                    break
                self._take(message)
        except AttachError as error:
            if error.is_final or not self._log_id:
                raise
            return str(error)  # it was attached, so trying again may help
        finally:
            waiting.cancel()
        return "the server does not answer"

    def _lose(self) -> None:
        with self._lock:
            connection, self._connection, self._has_state = self._connection, None, False
        if connection is not None:
            connection.close()

    def _connect_again(self, reason: str) -> bool:
        """Try to connect until it works; return False if the front end leaves before that."""
        if reason != self._lost_for:
            self._lost_for = reason
            self._publish(ev.ConnectionChanged(False, reason))
        while not self._closing.wait(self._pause_s):
            self._pause_s = min(2 * self._pause_s, MAX_WAIT_S)
            try:
                self.connect()
            except AttachError as error:
                if error.is_final:
                    raise
                _log.info("not connected: %s", error)
            else:
                return not self._closing.is_set()
        return False

    def _say_waiting(self) -> None:
        if not self._log_id and not self._closing.is_set():
            self._publish(ev.ModelLoading("Waiting for the session"))

    # --- messages of the server -------------------------------------------------------------------------------

    def _take(self, message: FromServer) -> None:
        match message:
            case Numbered(number, event) if number == self._number + 1:
                self._number = number
                self._apply(event)
            case Numbered(number) if number > self._number:
                raise AttachError(f"events {self._number + 1} to {number - 1} of the server are missing; attach again")
            case Private(event):
                self._apply(event)
            case Received(number):
                self._received(number)
            case State():
                self._show(message)
            case _:
                pass

    def _received(self, number: int) -> None:
        """Note which requests have arrived; after a new connection, send the others again."""
        with self._lock:
            self._pending.received(number)
            is_first, self._has_state = not self._has_state, True
            if is_first and self._connection is not None:
                for asked in self._pending.unreceived():
                    self._connection.send(request_text(asked))
        self._pause_s = FIRST_WAIT_S
        if is_first and self._lost_for:
            self._lost_for = ""
            self._publish(ev.ConnectionChanged(True))

    def _show(self, state: State) -> None:
        """Show the whole state of a session."""
        is_first, is_other = not self._log_id, self._log_id not in ("", state.log)
        self._log_id, self._number, self._is_new = state.log, state.number, self._is_new and not state.session
        self.session = state.session
        self._settings.use(state.settings, state.origins)
        with self._lock:
            ends = self._pending.ends_before(state.events, state.unfinished)
        for event in ends:
            self._publish(event)
        for event in state.events:
            is_redundant = ev.ConversationCleared if is_first else ev.ModelReady
            if not isinstance(event, is_redundant):
                self._publish(event)
        if is_other and self._lost_for:
            self._publish(
                ev.Notice("The server was restarted; requests that were waiting there were not carried out.", "warning")
            )

    def _apply(self, event: ev.Event) -> None:
        match event:
            case ev.SettingChanged():
                self._settings.follow(event)
            case ev.SessionOpened(session=session):
                self.session = session
            case ev.TurnFinished():
                with self._lock:
                    is_own = self._pending.is_own(event)
                if event.rolled_back and not is_own:
                    event = replace(event, text="")  # it is for whoever wrote it
            case ev.TextCounted():
                with self._lock:
                    self._pending.counted(event)
            case ev.TurnPagedIn():
                with self._lock:
                    self._pending.paged_in(event)
            case ev.SummaryReady():
                with self._lock:
                    is_own = self._pending.summarized()
                if not is_own:
                    event = replace(event, text="")  # it goes to the input of whoever asked for it
            case ev.TurnUndone(to_edit=True):
                with self._lock:
                    is_own = self._pending.undone_to_edit()
                event = replace(event, to_edit=is_own)
            case _:
                pass
        self._publish(event)

    def _publish(self, event: ev.Event) -> None:
        for sink in list(self._sinks):
            try:
                sink(event)
            except Exception:
                _log.exception("a subscriber failed on %s", type(event).__name__)
