"""Messages on their way to the engine: one runs, the others wait in order.

The queue has two parts. The messages of the first are sent one after the other, each when the engine is idle. Those of
the second are held until the user resumes them. Stopping a reply, a failed turn and a failed engine hold everything
that waits, so that no message is sent unexpectedly. A message written after that is not held, and goes before those
that are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from streamchat.base.events import Event
from streamchat.base.sanitize import encodable


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
    """The engine has failed."""


@dataclass(frozen=True)
class Message:
    """A message of the user."""

    typed: str
    """The text as typed, restored to the input if it is not sent."""
    text: str
    """The text for the model, with the mentioned files."""


@dataclass(frozen=True)
class QueuedMessage:
    """A message that waits."""

    key: int
    """Identifies the message while it waits, also after an edit."""
    message: Message
    held: bool = False
    """Waits for `Outbox.resume`."""


class Outbox:
    """Sends messages one at a time. Not thread-safe: a front end uses it on one thread.

    After a method that may release a message (`idle`, `resume`, `drop`, `end_edit`), call `send_next`.

    Args:
        send: Passes the text of a message to the engine.
    """

    def __init__(self, send: Callable[[str], None]) -> None:
        self._send = send
        self.phase = Phase.LOADING
        self._queue: list[QueuedMessage] = []
        self._editing: int | None = None
        """Key of the message that the user edits. It keeps its place, and nothing behind it is sent."""
        self._submitted: Message | None = None
        """The message of the running turn; None for a command."""
        self._done_when: Callable[[Event], bool] | None = None
        self._keys = 0

    @property
    def queue(self) -> tuple[QueuedMessage, ...]:
        """The messages that wait, in the order in which they are sent: held ones are last."""
        return tuple(self._queue)

    @property
    def waiting(self) -> int:
        """Number of messages that are not held: they are sent without further action of the user."""
        return sum(not each.held for each in self._queue)

    @property
    def edited(self) -> int | None:
        """Index of the message that the user edits."""
        return next((at for at, each in enumerate(self._queue) if each.key == self._editing), None)

    # --- sending ------------------------------------------------------------------------------------------------

    def offer(self, message: Message) -> SendResult:
        """Send `message`, or queue it behind the messages that are not held.

        During an edit it replaces the edited message in its place. The first of the queue is then no longer held.
        """
        if self.phase is Phase.FAILED:
            return SendResult.REFUSED
        at = self.edited
        if at is None:
            at = self.waiting
            self._queue.insert(at, self._numbered(message))
        else:
            before = self._queue[at]
            self._queue[at] = replace(before, message=message, held=before.held and at > 0)
            self._editing = None
        if at == 0 and self.send_next() is not None:
            return SendResult.SENT
        return SendResult.QUEUED

    def send_next(self) -> str | None:
        """Send the first message and return its text; None if none is due."""
        first = self._queue[0] if self._queue else None
        if self.phase is not Phase.IDLE or first is None or first.held or first.key == self._editing:
            return None
        del self._queue[0]
        self.phase, self._submitted = Phase.REPLYING, first.message
        self._send(first.message.text)
        return first.message.text

    def typed(self, text: str) -> str:
        """Return the message of the running turn, sent as `text`, as the user typed it."""
        return self._submitted.typed if self._submitted is not None and self._submitted.text == text else text

    # --- state of the engine ------------------------------------------------------------------------------------

    def begin_command(self, done_when: Callable[[Event], bool]) -> None:
        """Mark the engine busy with a command until `done_when` is true for an event."""
        self.phase, self._done_when = Phase.REPLYING, done_when

    def is_done(self, event: Event) -> bool:
        """Whether `event` ends the command passed to `begin_command`."""
        if self._done_when is None or not self._done_when(event):
            return False
        self._done_when = None
        return True

    def started(self) -> None:
        """Mark the engine as replying: a turn has started, perhaps that of another front end."""
        if self.phase is Phase.IDLE:
            self.phase = Phase.REPLYING

    def waits_behind(self, text: str) -> bool:
        """Whether the message of this front end is not the one whose turn, with this text, has ended."""
        return self._submitted is not None and bool(text) and encodable(self._submitted.text) != text

    def idle(self) -> None:
        """Mark the engine idle: the turn, the command or the loading has ended."""
        if self.phase is not Phase.FAILED:
            self.phase, self._submitted = Phase.IDLE, None

    def loading(self) -> None:
        """Mark the engine as loading a model; messages are queued."""
        if self.phase is Phase.IDLE:
            self.phase = Phase.LOADING

    def failed(self) -> None:
        """Mark the engine as failed. Hold all messages, that of the running turn first."""
        running, self._submitted = self._submitted, None
        self.phase = Phase.FAILED
        self.hold()
        if running is not None:
            self.put_back(running)

    # --- the queue ----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Hold all queued messages until `resume`."""
        self._queue = [replace(each, held=True) for each in self._queue]

    def resume(self) -> None:
        """Release all held messages, in order."""
        self._queue = [replace(each, held=False) for each in self._queue]

    def put_back(self, message: Message) -> None:
        """Queue a message that the engine did not answer, held, before the other held ones."""
        self._queue.insert(self.waiting, self._numbered(message, held=True))

    def edit(self, index: int) -> str:
        """Begin to edit the message at `index`, and return its text as typed. A previous edit ends without change."""
        self._editing = self._queue[index].key
        return self._queue[index].message.typed

    def end_edit(self) -> None:
        """End the edit; the message is unchanged."""
        self._editing = None

    def drop(self, index: int) -> Message:
        """Remove the message at `index` and return it."""
        return self._queue.pop(index).message

    def clear(self) -> list[Message]:
        """Remove all queued messages and return them."""
        dropped, self._queue = [each.message for each in self._queue], []
        return dropped

    def _numbered(self, message: Message, held: bool = False) -> QueuedMessage:
        self._keys += 1
        return QueuedMessage(self._keys, message, held)
