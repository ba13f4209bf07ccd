"""The front ends that the server knows, including those that have lost their connection."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Protocol

from streamchat.attach.frames import event_text
from streamchat.base import events as ev
from streamchat.base.errors import StreamchatError
from streamchat.base.requests import (
    CancelFetch,
    Clear,
    FetchModel,
    Fork,
    OpenSession,
    Request,
    SetSystemPrompt,
    Stop,
    TurnRequest,
)
from streamchat.server.attached.host import KEPT_MODEL, NewSession, OtherSession
from streamchat.server.attached.session import SharedSession
from streamchat.server.attached.sessions import Placed, SharedSessions

MAX_CLIENTS = 1000
MAX_PRIVATE = 256
"""Private messages that wait for a front end; older ones are dropped."""
LEAVING = (Clear, SetSystemPrompt, OpenSession, Fork)
"""Requests after which a front end may move to another session."""


class Link(Protocol):
    """The connection of a front end."""

    def show(self, placed: Placed) -> None:
        """Send a state."""
        ...

    def wake(self) -> None:
        """Check for requests to start and messages to send."""
        ...

    def end(self) -> None:
        """End the connection."""
        ...


@dataclass(eq=False)
class Client:
    """One front end. Used on the event loop's thread only.

    Args:
        id: An id that the front end chose, by which it is recognized after a lost connection.
        sessions: All shared sessions.
    """

    id: str
    sessions: SharedSessions
    shared: SharedSession | None = None
    """The session that it is attached to."""
    received: int = 0
    """Number of the newest request that was received."""
    unfinished: set[int] = field(default_factory=set)
    """Numbers of its turns that run or wait."""
    leaving: bool = False
    """Whether a request may still move it to another session; later requests wait."""
    connection: Link | None = None
    private: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_PRIVATE))

    def take(self, number: int, request: Request) -> None:
        """Carry out a request, unless it arrived before."""
        if number <= self.received:
            return
        self.received = number
        if isinstance(request, FetchModel):
            self._say(ev.ModelFetched(request.name, KEPT_MODEL.format(name=request.name)))
        elif not isinstance(request, CancelFetch | Stop) and self.shared is not None:
            if isinstance(request, TurnRequest):
                self.unfinished.add(number)
            self.leaving |= isinstance(request, LEAVING)
            self.shared.send(request, _Numbered(self, number, self.shared))

    def stop(self) -> None:
        """Stop the running turn, or the first waiting one."""
        if self.shared is not None:
            self.shared.send(Stop(), _Numbered(self, 0, self.shared))

    def is_at(self, log: str) -> bool:
        """Return whether it is attached to the session with this history."""
        return self.shared is not None and self.shared.history.id == log

    def place(self, placed: Placed) -> None:
        """Attach it to a session, and send the state."""
        self.shared = placed.shared
        if placed.shared.is_dropped:  # many others came meanwhile
            self.sessions.describe(placed.shared, self.place, self.stay)
            return
        self.leaving = False
        if self.connection is not None:
            self.connection.show(placed)

    def stay(self, error: StreamchatError) -> None:
        """Report why it stays in its session."""
        self.leaving = False
        self._say(ev.Notice(str(error), "error"))

    def _say(self, event: ev.Event) -> None:
        self.private.append(event_text(event))
        self.wake()

    def wake(self) -> None:
        """Let its connection send what is waiting."""
        if self.connection is not None:
            self.connection.wake()

    def _done(self, number: int, moves: bool) -> None:
        self.unfinished.discard(number)
        self.leaving &= moves
        self.wake()


@dataclass(frozen=True)
class _Numbered:
    """Implements `Sender` for one request of a front end."""

    client: Client
    number: int
    shared: SharedSession

    def tell(self, event: ev.Event) -> None:
        self.client.sessions.post(self.client._say, event)

    def done(self, *, moves: bool) -> None:
        self.client.sessions.post(self.client._done, self.number, moves)

    def move(self, wish: NewSession | OtherSession) -> None:
        client, sessions = self.client, self.client.sessions
        sessions.post(lambda: sessions.find(wish, self.shared, client.place, client.stay))


class Clients:
    """The front ends that were connected recently. Used on the event loop's thread only."""

    def __init__(self, sessions: SharedSessions) -> None:
        self._sessions = sessions
        self._clients: OrderedDict[str, Client] = OrderedDict()

    def get(self, id_: str) -> Client:
        """Return the front end with this id, or a new one if the id is unknown."""
        client = self._clients.setdefault(id_, Client(id_, self._sessions))
        self._clients.move_to_end(id_)
        for each in [each for each in self._clients.values() if each.connection is None and each is not client]:
            if len(self._clients) <= MAX_CLIENTS:
                break
            del self._clients[each.id]
        return client

    def connected(self) -> list[Client]:
        """Return the connected front ends."""
        return [client for client in list(self._clients.values()) if client.connection is not None]
