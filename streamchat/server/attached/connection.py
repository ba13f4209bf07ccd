"""One connection of a front end: reads its requests, and sends the messages that it has not seen, at its own pace."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from streamchat.attach.frames import (
    Asked,
    Hello,
    Refusal,
    State,
    event_text,
    hello_text,
    read_request,
    received_text,
    refusal_text,
    state_text,
)
from streamchat.base import events as ev
from streamchat.base.errors import MissingSessionError, StreamchatError, WireError
from streamchat.base.requests import Stop
from streamchat.config.loader import Configuration
from streamchat.config.settings import setting_fields, spec_of
from streamchat.server.attached.clients import Client
from streamchat.server.attached.sessions import Placed, Wish

_log = logging.getLogger(__name__)
MAX_WAITING = 32
"""Maximum number of waiting requests per session. Beyond it, as many wait in the connection of each front end."""
MAX_ERRORS = 16
"""Number of invalid messages after which a connection is closed."""
POLICY, TRY_AGAIN = 1008, 1013
"""Codes of closed WebSockets."""


class Connection:
    """Connects one front end with its session. Used on the event loop's thread only.

    A session stores its events once for all of its front ends, and each connection stores its position among them. A
    slow connection therefore neither delays others nor needs a queue; if it falls too far behind, it gets the whole
    state again.

    Args:
        socket: The accepted WebSocket.
        client: The front end.
    """

    def __init__(self, socket: WebSocket, client: Client) -> None:
        self._socket, self._client = socket, client
        self._news, self._has_room = asyncio.Event(), asyncio.Event()
        self._has_room.set()
        self._waiting: deque[Asked] = deque()
        """Requests whose receipt is not confirmed to the front end yet."""
        self._is_placed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._placed: Placed | None = None
        """A state to send."""
        self._refusal: StreamchatError | None = None
        self._is_lost = False
        """Whether missed events are no longer in the history, and a state was requested instead."""
        self._number = 0
        """Number of the latest event that was sent."""
        self._acknowledged = -1

    async def run(self, hello: Hello, wish: Wish, log: str, after: int) -> None:
        """Serve the front end until its connection ends.

        Args:
            hello: The first message.
            wish: The session that it wants; ignored if it is attached to one since an earlier connection.
            log: Id of the history of the events that it has; '' for none.
            after: Number of the latest event that it has.
        """
        client = self._client
        if client.connection is not None:
            client.connection.end()
        client.connection = self
        await self._socket.send_text(hello_text(hello))
        shared = client.shared
        if shared is not None and client.is_at(log) and shared.history.reaches(after) and not shared.is_dropped:
            self._number, self._is_placed = after, True
        elif shared is not None:
            client.sessions.describe(shared, client.place, self._refuse)
        else:
            client.sessions.find(wish, None, client.place, self._refuse)
        self.wake()
        tasks = self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            if client.connection is self:
                client.connection = None
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect | RuntimeError | OSError):
                _log.error("a front end's connection failed", exc_info=result)

    def end(self) -> None:
        """End the connection, because the front end has a newer one."""
        for task in self._tasks:
            task.cancel()

    def show(self, placed: Placed) -> None:
        """Send a state."""
        self._placed, self._is_placed, self._is_lost = placed, True, False
        self.wake()

    def wake(self) -> None:
        """Check for requests to start and messages to send."""
        self._start_waiting()
        self._news.set()

    def _refuse(self, error: StreamchatError) -> None:
        self._refusal = error
        self.wake()

    # --- requests ---------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        errors = 0
        while errors < MAX_ERRORS:
            await self._has_room.wait()
            message = await self._socket.receive()
            if message["type"] != "websocket.receive":
                return
            text = message.get("text")
            try:
                asked = read_request(message.get("bytes") or b"" if text is None else text)
            except WireError as error:
                errors += 1
                self._client.private.append(event_text(ev.Notice(f"the server refuses a request: {error}", "error")))
            else:
                self._add(asked)
            self.wake()
        with suppress(RuntimeError):
            await self._socket.close(POLICY, f"{MAX_ERRORS} messages were not valid")

    def _add(self, asked: Asked) -> None:
        """Queue a request after those before it; `Stop` takes effect at once."""
        stops = isinstance(asked.request, Stop) and asked.number > self._client.received
        if stops:
            self._client.stop()
        self._waiting.append(asked)

    def _start_waiting(self) -> None:
        """Start queued requests, unless the session has too many, or the front end is moving to another session."""
        client = self._client
        while (
            self._waiting
            and self._is_placed
            and not client.leaving
            and client.shared is not None
            and client.shared.waiting < MAX_WAITING
        ):
            asked = self._waiting.popleft()
            client.take(asked.number, asked.request)
        if len(self._waiting) < MAX_WAITING:
            self._has_room.set()
        else:
            self._has_room.clear()

    # --- events -----------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while texts := self._next():
                for text in texts:
                    await self._socket.send_text(text)
                    await asyncio.sleep(0)  # so that a connection that is lost is noticed before the next one
            if self._refusal is not None:
                is_final = isinstance(self._refusal, MissingSessionError)
                refusal = Refusal(str(self._refusal), int(self._refusal.exit_code), is_final)
                await self._socket.send_text(refusal_text(refusal))
                await self._socket.close(TRY_AGAIN)
                return

    def _next(self) -> list[str]:
        """Return the next messages: private ones, a state, a confirmation of requests, or events."""
        client, texts = self._client, list(self._client.private)
        client.private.clear()
        if self._placed is not None:
            placed, self._placed = self._placed, None
            self._number, self._acknowledged = placed.number, client.received
            return [*texts, self._state(placed), received_text(client.received)]
        shared = client.shared
        if shared is None or not self._is_placed or self._is_lost:
            return texts
        if self._acknowledged != client.received:
            self._acknowledged = client.received
            texts.append(received_text(client.received))
        if not shared.history.reaches(self._number):
            self._is_lost = True
            client.sessions.describe(shared, client.place, self._refuse)
            return texts
        events = shared.history.after(self._number)
        self._number += len(events)
        return texts + events

    def _state(self, placed: Placed) -> str:
        shared = placed.shared
        settings, origins = _shared_settings(shared.configuration)
        session = shared.session
        return state_text(
            State(
                shared.history.id,
                placed.number,
                session.id if session.is_saved else "",
                settings,
                origins,
                tuple(sorted(self._client.unfinished)),
                placed.events,
            )
        )


def _shared_settings(configuration: Configuration) -> tuple[dict[str, object], dict[str, str]]:
    """Return the settings that the front ends of a session share, and their origins as displayed."""
    names = [name for name in setting_fields() if spec_of(name).section != "interface"]
    settings = {name: getattr(configuration.settings, name) for name in names}
    return settings, {name: configuration.origin(name) for name in names}
