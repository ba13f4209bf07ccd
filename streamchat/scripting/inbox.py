"""Collects the events of an engine for a program that asks for them."""

from __future__ import annotations

import queue
import threading

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, ExitCode, ModelError, StoreError, StreamchatError
from streamchat.frontend.status import StatusBoard

WAIT_S = 0.5
"""How long one wait lasts; between two waits Ctrl+C takes effect on every system."""
_ERRORS: dict[int, type[StreamchatError]] = {
    ExitCode.USAGE: ConfigError,
    ExitCode.MODEL: ModelError,
    ExitCode.STORE: StoreError,
}


class Inbox:
    """Receives every event on the engine's thread, and returns them to another thread in order.

    Figures and history are up to date as soon as an event was received, whether it was returned or not.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[ev.Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._board = StatusBoard()
        self._turns: list[ev.SavedTurn] = []
        self._failure: ev.EngineFailed | None = None
        self._closed = threading.Event()

    # --- on the engine's thread ---------------------------------------------------------------------------------

    def put(self, event: ev.Event) -> None:
        """Receive an event."""
        with self._lock:
            self._board.apply(event)
            self._note(event)
        if not isinstance(event, ev.StatusSampled):
            self._events.put(event)
        if isinstance(event, ev.EngineClosed):
            self._closed.set()

    def _note(self, event: ev.Event) -> None:
        match event:
            case ev.TurnFinished(rolled_back=False, stats=stats):
                self._turns.append(
                    ev.SavedTurn(
                        stats.turn,
                        event.text,
                        event.reply,
                        stats.prompt_tokens,
                        stats.new_tokens,
                        stats.ttft_s,
                        stats.decode_tps,
                        stats.finish_reason,
                    )
                )
            case ev.TurnUndone():
                self._turns = self._turns[:-1]
            case ev.ConversationCleared():
                self._turns = []
            case ev.ConversationResumed(turns=turns):
                self._turns = list(turns)
            case ev.EngineFailed():
                self._failure = event
            case _:
                pass

    # --- on the program's thread --------------------------------------------------------------------------------

    @property
    def board(self) -> StatusBoard:
        """The figures; they change while the engine runs."""
        return self._board

    @property
    def turns(self) -> tuple[ev.SavedTurn, ...]:
        """The turns of the conversation, oldest first."""
        with self._lock:
            return tuple(self._turns)

    def get(self) -> ev.Event:
        """Return the next event; waits for it.

        Raises:
            StreamchatError: The engine has ended; the class follows from its exit code.
        """
        while True:
            try:
                event = self._events.get(timeout=WAIT_S)
            except queue.Empty:
                if self._closed.is_set() and self._events.empty():
                    raise self._error() from None
                continue
            if not isinstance(event, ev.EngineFailed | ev.EngineClosed):
                return event
            if isinstance(event, ev.EngineClosed):
                raise self._error()

    def get_waiting(self) -> list[ev.Event]:
        """Return the events that were received and not returned yet."""
        events = []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def _error(self) -> StreamchatError:
        failure = self._failure
        if failure is None:
            return StreamchatError("the chat is closed; make a new one with Chat()")
        return _ERRORS.get(failure.exit_code, StreamchatError)(failure.message)
