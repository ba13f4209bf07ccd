"""What a face may ask of the engine. App and prompt are written against this, and tested with a scripted one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from streamchat.base.events import Event
from streamchat.config.settings import Settings


class ChatEngine(Protocol):
    """Requests are queued and carried out in order by one owner thread; all methods return at once.

    What happens is told to the subscribers, on the engine's thread: a screen must hand events over to its own loop.
    """

    @property
    def settings(self) -> Settings:
        """The settings in force, including changes by `set_option`."""
        ...

    @property
    def busy(self) -> bool:
        """A turn is running or queued."""
        ...

    def subscribe(self, sink: Callable[[Event], None]) -> Callable[[], None]:
        """Call `sink` with every event from now on; returns a function that ends it."""
        ...

    def start(self) -> None:
        """Start loading the model. Ends in `ModelReady` or `EngineFailed`."""
        ...

    def submit(self, text: str) -> None:
        """Queue a user message; `TurnStarted` ... `TurnFinished` follow. Allowed before `ModelReady`."""
        ...

    def stop_reply(self) -> None:
        """Stop the running turn soon. Text that was shown stays and the turn is closed; else it is rolled back."""
        ...

    def clear(self) -> None:
        """Forget the conversation, keep model, system prompt and settings; `ConversationCleared` follows."""
        ...

    def set_system_prompt(self, text: str) -> None:
        """Start over with another system prompt, pinned at the start of the cache; `ConversationCleared` follows."""
        ...

    def set_option(self, name: str, value: Any) -> None:
        """Change a live setting (checked by the caller) from the next turn on; `SettingChanged` follows."""
        ...

    def pin(self, turn: int) -> None:
        """Keep this turn in the cache; `TurnPinned` follows, or a `Notice` that says why not."""
        ...

    def unpin(self, turn: int) -> None:
        """Let this turn leave again; `TurnPinned` follows, or a `Notice` that says why not."""
        ...

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it: `ModelLoading` ... `ConversationCleared`, `ModelReady`.

        Where it cannot be loaded, a `Notice` says why, and the conversation goes on with the old one.
        """
        ...

    def count_tokens(self, text: str) -> None:
        """Measure a text that may be sent; `TextCounted` follows once the engine is idle."""
        ...

    def undo(self, to_edit: bool = False) -> None:
        """Take the newest turn back, as if it had not been: `TurnUndone`, or a `Notice` that says why not.

        `to_edit` is passed on with the event: the user wants the message back.
        """
        ...

    def retry(self) -> None:
        """Take the newest turn back and answer its message again: `TurnUndone`, then as after `submit`.

        Where there is none, a `TurnFinished` with an error follows.
        """
        ...

    def edit(self, text: str) -> None:
        """Take the newest turn back and send `text` in its place; events as of `retry`."""
        ...

    def quote(self, text: str, reply: str, pin: bool) -> None:
        """A turn with a given reply, pinned where asked for; events as of `submit`, then `TurnPinned`."""
        ...

    def compact(self) -> None:
        """Have the model sum up what would leave next; `SummaryReady` follows. Nothing is changed."""
        ...

    def open_session(self, session: str, agreed_model: str = "") -> None:
        """Go on with a saved conversation: `ConversationResumed`, or a `Notice` of level 'error' that says why not.

        An imported one that names a model of its own is opened only with that as `agreed_model`.
        """
        ...

    @property
    def saving(self) -> bool:
        """The cache is being written to the disk; leaving waits for that."""
        ...

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop everything and end the thread; returns whether it ended in time. May be called twice."""
        ...
