"""Queue between the user and the engine: at most one message runs and one waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from streamchat.base.events import Event
from streamchat.base.requests import Submit
from streamchat.engine.protocol import ChatEngine


class Phase(Enum):
    """State of the engine with respect to sending."""

    LOADING = "loading"
    IDLE = "idle"
    REPLYING = "replying"
    """From sending until the turn has ended."""
    FAILED = "failed"


class SendResult(Enum):
    """Result of `Outbox.offer`."""

    SENT = "sent"
    QUEUED = "queued"
    REFUSED = "refused"
    """A message is already queued, or the engine has failed."""


@dataclass(frozen=True)
class Message:
    """A message of the user."""

    typed: str
    """The text as typed, restored to the input if it is not sent."""
    text: str
    """The text for the model, with the mentioned files."""


class Outbox:
    """Sends messages one at a time. Not thread-safe; use it on the app's thread only."""

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine
        self.phase = Phase.LOADING
        self.queued: Message | None = None
        """The message to send when the engine is idle."""
        self._submitted: Message | None = None
        self._done_when: Callable[[Event], bool] | None = None

    def offer(self, message: Message) -> SendResult:
        """Send `message`, or queue it."""
        if self.phase is Phase.IDLE:
            self._submit(message)
            return SendResult.SENT
        if self.phase is Phase.FAILED or self.queued is not None:
            return SendResult.REFUSED
        self.queued = message
        return SendResult.QUEUED

    def typed(self, text: str) -> str:
        """Return the message sent as `text` as the user typed it."""
        return self._submitted.typed if self._submitted is not None and self._submitted.text == text else text

    def begin_command(self, done_when: Callable[[Event], bool]) -> None:
        """Mark the engine busy with a command until `done_when` is true for an event."""
        self.phase, self._done_when = Phase.REPLYING, done_when

    def is_done(self, event: Event) -> bool:
        """Whether `event` ends the command passed to `begin_command`."""
        if self._done_when is None or not self._done_when(event):
            return False
        self._done_when = None
        return True

    def idle(self) -> str | None:
        """Mark the engine idle; sends the queued message, if any, and returns its text."""
        if self.phase is Phase.FAILED:
            return None
        self.phase = Phase.IDLE
        message, self.queued = self.queued, None
        if message is None:
            return None
        self._submit(message)
        return message.text

    def loading(self) -> None:
        """Mark the engine as loading a model; messages are queued."""
        if self.phase is Phase.IDLE:
            self.phase = Phase.LOADING

    def recall_queued(self) -> str | None:
        """Remove the queued message and return it as typed."""
        message, self.queued = self.queued, None
        return message.typed if message is not None else None

    def failed(self) -> str | None:
        """Mark the engine as failed; returns the queued message as typed."""
        self.phase = Phase.FAILED
        return self.recall_queued()

    def _submit(self, message: Message) -> None:
        self.phase, self._submitted = Phase.REPLYING, message
        self._engine.send(Submit(message.text))
