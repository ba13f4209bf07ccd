"""The interface of the engine for front ends, which are tested with a scripted implementation of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from streamchat.base.events import Event
from streamchat.base.requests import Request
from streamchat.config.settings import Settings


class ChatEngine(Protocol):
    """Requests in, events out. One thread processes the requests in order; all methods but `close` return at once.

    Events are emitted to subscribers on the engine's thread, those of a fetch on another one: a front end must pass
    them to its own event loop.
    """

    @property
    def settings(self) -> Settings:
        """The current settings, including changes by `SetOption`."""
        ...

    def origin(self, name: str) -> str:
        """Return where the value of a setting came from: a flag, a file, the model, `/set`, for messages."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a `TurnRequest` is running or queued."""
        ...

    @property
    def saving(self) -> bool:
        """Whether the conversation is being saved; closing waits for it."""
        ...

    @property
    def server(self) -> str:
        """Address of the server that has the model and the session; '' if this process has them."""
        ...

    def subscribe(self, sink: Callable[[Event], None]) -> Callable[[], None]:
        """Call `sink` with every event from now on; return a function that unsubscribes it."""
        ...

    def start(self) -> None:
        """Start loading the model. Ends in `ModelReady` or `EngineFailed`."""
        ...

    def send(self, request: Request) -> None:
        """Queue a request; each class of `streamchat.base.requests` says which events follow."""
        ...

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop everything and end the thread; return whether it ended in time. May be called twice."""
        ...
