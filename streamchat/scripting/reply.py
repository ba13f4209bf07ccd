"""A reply: as a stream of events while it is generated, and as text that a notebook renders."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from streamchat.base import events as ev
from streamchat.base.errors import StreamchatError, TurnError
from streamchat.base.requests import Stop
from streamchat.base.thinking import split
from streamchat.engine.protocol import ChatEngine
from streamchat.scripting.inbox import Inbox


class Reply(str):
    """The text of a reply, with how it ended. A notebook renders it as Markdown.

    `finish_reason` is 'stop', 'length' (`max_new_tokens` was reached), 'loop' (it repeated itself), or 'cancelled' (it
    was stopped); `stats` has the figures of the turn.
    """

    finish_reason: ev.FinishReason
    stats: ev.TurnStats

    def __new__(cls, finished: ev.TurnFinished) -> Reply:
        reply = super().__new__(cls, finished.reply)
        reply.finish_reason, reply.stats = finished.finish_reason, finished.stats
        return reply

    @property
    def thoughts(self) -> str:
        """The reasoning before the answer; '' for none."""
        return split(str(self))[0]

    @property
    def answer(self) -> str:
        """The reply without its reasoning."""
        return split(str(self))[1]

    def _repr_markdown_(self) -> str:
        return reply_markdown(str(self))


def reply_markdown(text: str) -> str:
    """Return a reply as Markdown for a notebook: HTML in it is escaped, and reasoning is a quotation."""
    from streamchat.sessions.transcripts.contained import contained  # deferred: imports a parser

    thoughts, answer = split(text)
    quoted = "".join(f"> {line}".rstrip() + "\n" for line in contained(thoughts).splitlines())
    return f"{quoted}\n{contained(answer)}" if thoughts else contained(answer)


class RunningTurn:
    """One turn on the engine, which is read from one thread."""

    def __init__(self, engine: ChatEngine, inbox: Inbox) -> None:
        self._engine, self._inbox = engine, inbox
        self.thread = threading.get_ident()
        self.finished: ev.TurnFinished | None = None
        self.failed = False
        """Whether the engine ended before the turn."""

    @property
    def is_done(self) -> bool:
        """Whether the last event of the turn was read."""
        return self.failed or self.finished is not None

    def next_event(self) -> ev.Event:
        """Return the next event, and stop the reply on Ctrl+C.

        Raises:
            StreamchatError: The engine has ended.
            KeyboardInterrupt: Ctrl+C; the reply was stopped.
        """
        try:
            return self._read()
        except KeyboardInterrupt:
            self.cancel()
            raise

    def _read(self) -> ev.Event:
        try:
            event = self._inbox.get()
        except StreamchatError:
            self.failed = True
            raise
        if isinstance(event, ev.TurnFinished):
            self.finished = event
        return event

    def stop(self) -> None:
        """Tell the engine to stop the reply, without waiting."""
        if not self.is_done:
            self._engine.send(Stop())

    def cancel(self) -> None:
        """Stop the reply and wait until the turn has ended."""
        self.stop()
        while not self.is_done:
            try:
                self._read()
            except StreamchatError:
                return


class ReplyStream(Iterator[ev.Event]):
    """The events of one turn, as they happen; `TurnFinished` is the last.

    A stream that is dropped before its end, for example by `break`, stops the reply.
    """

    def __init__(self, turn: RunningTurn) -> None:
        self._turn = turn
        self._is_reported = False

    def __next__(self) -> ev.Event:
        """Return the next event.

        Raises:
            TurnError: The turn failed and was rolled back; raised after `TurnFinished`.
            StreamchatError: The engine has ended.
            KeyboardInterrupt: Ctrl+C; the reply was stopped, and the chat can be used.
        """
        finished = self._turn.finished
        if self._turn.failed:
            raise StopIteration
        if finished is None:
            return self._turn.next_event()
        if finished.finish_reason == "error" and not self._is_reported:
            self._is_reported = True
            raise TurnError(finished.message, finished.failure)
        raise StopIteration

    def __del__(self) -> None:
        self._turn.stop()

    @property
    def is_done(self) -> bool:
        """Whether the turn has ended."""
        return self._turn.is_done

    @property
    def reply(self) -> Reply | None:
        """The whole reply; None before the end of the turn."""
        return None if self._turn.finished is None else Reply(self._turn.finished)

    def close(self) -> None:
        """Stop the reply, if it is running, and wait until the turn has ended."""
        self._turn.cancel()
