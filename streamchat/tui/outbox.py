"""Which message may go to the engine when: one runs, at most one waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from streamchat.base.events import Event
from streamchat.engine.protocol import ChatEngine


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


@dataclass(frozen=True)
class Message:
    """What the user wants to say."""

    typed: str
    """As it stood in the input: what comes back when it cannot be sent."""
    text: str
    """For the model, with the files that it mentions."""


class Outbox:
    """Keeps order between the user and the engine. The app's thread only."""

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine
        self.phase = Phase.LOADING
        self.waiting: Message | None = None
        """The message that goes out as soon as the engine is idle."""
        self._submitted: Message | None = None
        self._over: Callable[[Event], bool] | None = None

    def offer(self, message: Message) -> Sent:
        """Send `message`, or let it wait."""
        if self.phase is Phase.IDLE:
            self._submit(message)
            return Sent.SENT
        if self.phase is Phase.FAILED or self.waiting is not None:
            return Sent.REFUSED
        self.waiting = message
        return Sent.WAITS

    def typed(self, text: str) -> str:
        """How the user typed the message that was sent as `text`."""
        return self._submitted.typed if self._submitted is not None and self._submitted.text == text else text

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
        message, self.waiting = self.waiting, None
        if message is None:
            return None
        self._submit(message)
        return message.text

    def loading(self) -> None:
        """A model is being loaded; what is sent meanwhile waits."""
        if self.phase is Phase.IDLE:
            self.phase = Phase.LOADING

    def take_back(self) -> str | None:
        """The message that waits, as it was typed; it waits no longer."""
        message, self.waiting = self.waiting, None
        return message.typed if message is not None else None

    def failed(self) -> str | None:
        """The engine has ended; returns the message that waited, as it was typed."""
        self.phase = Phase.FAILED
        return self.take_back()

    def _submit(self, message: Message) -> None:
        self.phase, self._submitted = Phase.REPLYING, message
        self._engine.submit(message.text)
