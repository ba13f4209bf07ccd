"""Which message may go to the engine when: one runs, at most one waits."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from streamchat.chat.client import ChatEngine
from streamchat.chat.events import Event


class Phase(Enum):
    """What the engine does, as far as sending is concerned."""

    LOADING = "loading"
    IDLE = "idle"
    REPLYING = "replying"
    """From sending until the turn is over."""
    FAILED = "failed"


class Sent(Enum):
    """What became of a message."""

    SENT = "sent"
    WAITS = "waits"
    REFUSED = "refused"
    """One waits already, or the engine has ended."""


class Outbox:
    """Keeps order between the user and the engine. The app's thread only."""

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine
        self.phase = Phase.LOADING
        self.waiting: str | None = None
        """The message that goes out as soon as the engine is idle."""
        self._over: Callable[[Event], bool] | None = None

    def offer(self, text: str) -> Sent:
        """Send `text`, or let it wait."""
        if self.phase is Phase.IDLE:
            self._submit(text)
            return Sent.SENT
        if self.phase is Phase.FAILED or self.waiting is not None:
            return Sent.REFUSED
        self.waiting = text
        return Sent.WAITS

    def begin(self, over: Callable[[Event], bool]) -> None:
        """The engine works on something else than a message, until an event for which `over` is true."""
        self.phase, self._over = Phase.REPLYING, over

    def is_over(self, event: Event) -> bool:
        """Whether `event` ends what `begin` told of."""
        if self._over is None or not self._over(event):
            return False
        self._over = None
        return True

    def idle(self) -> str | None:
        """The engine is ready or has finished a turn; returns the message that went out now, if one waited."""
        if self.phase is Phase.FAILED:
            return None
        self.phase = Phase.IDLE
        text = self.take_back()
        if text is not None:
            self._submit(text)
        return text

    def loading(self) -> None:
        """A model is being loaded; what is sent meanwhile waits."""
        if self.phase is Phase.IDLE:
            self.phase = Phase.LOADING

    def take_back(self) -> str | None:
        """The message that waits, which waits no longer."""
        text, self.waiting = self.waiting, None
        return text

    def failed(self) -> str | None:
        """The engine has ended; returns the message that waited."""
        self.phase = Phase.FAILED
        return self.take_back()

    def _submit(self, text: str) -> None:
        self.phase = Phase.REPLYING
        self._engine.submit(text)
