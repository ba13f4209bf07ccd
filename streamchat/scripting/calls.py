"""Calls of a program to an engine: one request at a time, from any thread."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TypeVar

from streamchat.base import events as ev
from streamchat.base import requests as rq
from streamchat.base.errors import ConfigError, StreamchatError, TurnError
from streamchat.base.sanitize import one_line
from streamchat.engine.protocol import ChatEngine
from streamchat.scripting.inbox import Inbox
from streamchat.scripting.reply import ReplyStream, RunningTurn

_log = logging.getLogger("streamchat.scripting.chat")  # the name in docs/python.md
_E = TypeVar("_E", bound=ev.Event)


class Calls:
    """Sends requests to an engine and returns the events of each.

    Every call raises `TurnError` while another thread reads a reply, and `StreamchatError` after `close`, in a forked
    process, and if the engine has ended.
    """

    def __init__(self, engine: ChatEngine, inbox: Inbox) -> None:
        self._engine, self._inbox = engine, inbox
        self._turn: RunningTurn | None = None
        self._stream: weakref.ref[ReplyStream] | None = None
        self._count = 0
        self._lock = threading.RLock()
        """Held while a request starts, so that no two threads read the events of one."""
        self._process = os.getpid()
        self.is_closed = False

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from that of the engine, and has neither its threads nor its locks."""
        return os.getpid() != self._process

    def close(self) -> None:
        """Refuse all further calls."""
        self.is_closed = True

    def run(self, request: rq.TurnRequest) -> ReplyStream:
        """Start a turn and return the stream of its events."""
        with self._lock:
            self._settle()
            self._engine.send(request)
            self._turn = RunningTurn(self._engine, self._inbox)
            stream = ReplyStream(self._turn)
            self._stream = weakref.ref(stream)
            return stream

    def wait_until_ready(self) -> None:
        """Wait until the engine has a model, and log its notices as they come."""
        with self._lock:
            self._settle()
            for event in self._answers():
                _report(event)

    def call(self, request: rq.Request) -> list[ev.Event]:
        """Send a request, wait until it was carried out, and return its events."""
        with self._lock:
            self._settle()
            self._engine.send(request)
            return list(self._answers())

    def expect(self, request: rq.Request, kind: type[_E]) -> _E:
        """Send a request and return the event of class `kind` that it causes.

        Raises:
            ConfigError: There was none.
        """
        events = self.call(request)
        for event in events:
            if isinstance(event, kind):
                return event
        raise ConfigError(reason(events))

    def _settle(self) -> None:
        """End a reply that nobody reads any more, and report what happened since the last call.

        Raises:
            TurnError: Another thread is reading it.
            StreamchatError: The chat is closed, or belongs to another process.
        """
        if self.is_closed:
            raise StreamchatError("the chat is closed; make a new one with Chat()")
        if self.is_forked:
            raise StreamchatError("this process was forked from the one of the chat; make the chat here with Chat()")
        turn = self._turn
        if turn is not None and not turn.is_done:
            is_read = self._stream is not None and self._stream() is not None
            if is_read and turn.thread != threading.get_ident():
                raise TurnError("another thread is reading a reply of this chat; wait for its end, or call stop()")
            turn.cancel()
        self._turn = None
        for event in self._inbox.get_waiting():
            _report(event)

    def _answers(self) -> Iterator[ev.Event]:
        """Yield the events until every request sent so far was carried out."""
        self._count += 1
        mark = str(self._count)
        self._engine.send(rq.CountTokens(mark))  # requests are answered in order
        while True:
            event = self._inbox.get()
            if not isinstance(event, ev.TextCounted):
                yield event
            elif event.text == mark:  # others are of calls that were interrupted
                return


def reason(events: Sequence[ev.Event]) -> str:
    """Return why a request had no effect: the text of its last notice."""
    texts = [event.text for event in events if isinstance(event, ev.Notice)]
    return texts[-1] if texts else "nothing has changed"


def _report(event: ev.Event) -> None:
    """Log a notice."""
    if isinstance(event, ev.Notice):
        _log.log(logging.INFO if event.level == "info" else logging.WARNING, "%s", one_line(event.text))
