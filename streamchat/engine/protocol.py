"""The interface of the engine for front ends, which are tested with a scripted implementation of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from streamchat.base.events import Event
from streamchat.config.settings import Settings


class ChatEngine(Protocol):
    """Requests are queued and processed in order by one thread; all methods return at once.

    Events are emitted to subscribers on the engine's thread: a front end must pass them to its own event loop.
    """

    @property
    def settings(self) -> Settings:
        """The current settings, including changes by `set_option`."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a turn is running or queued."""
        ...

    def subscribe(self, sink: Callable[[Event], None]) -> Callable[[], None]:
        """Call `sink` with every event from now on; return a function that unsubscribes it."""
        ...

    def start(self) -> None:
        """Start loading the model. Ends in `ModelReady` or `EngineFailed`."""
        ...

    def submit(self, text: str) -> None:
        """Queue a user message; `TurnStarted` ... `TurnFinished` follow. Allowed before `ModelReady`."""
        ...

    def stop_reply(self) -> None:
        """Stop the running turn soon. Text that was shown is kept; a turn without any is rolled back."""
        ...

    def clear(self) -> None:
        """Clear the conversation, keep model, system prompt and settings; `ConversationCleared` follows."""
        ...

    def set_system_prompt(self, text: str) -> None:
        """Start over with another system prompt, pinned at the start of the cache; `ConversationCleared` follows."""
        ...

    def set_option(self, name: str, value: Any) -> None:
        """Change a live setting (checked by the caller) from the next turn on; `SettingChanged` follows."""
        ...

    def pin(self, turn: int) -> None:
        """Pin a turn in the cache; `TurnPinned` follows, or a `Notice` with the reason why not."""
        ...

    def unpin(self, turn: int) -> None:
        """Unpin a turn; `TurnPinned` follows, or a `Notice` with the reason why not."""
        ...

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it: `ModelLoading` ... `ConversationCleared`, `ModelReady`.

        If it cannot be loaded, a `Notice` says why, and the conversation continues with the old model.
        """
        ...

    def count_tokens(self, text: str) -> None:
        """Count the tokens of a text; `TextCounted` follows once the engine is idle."""
        ...

    def undo(self, to_edit: bool = False) -> None:
        """Undo the newest turn: `TurnUndone`, or a `Notice` with the reason why not.

        `to_edit` is passed on with the event: the user wants to edit the message.
        """
        ...

    def retry(self) -> None:
        """Undo the newest turn and reply to its message again: `TurnUndone`, then as after `submit`.

        Without a turn, a `TurnFinished` with an error follows.
        """
        ...

    def edit(self, text: str) -> None:
        """Undo the newest turn and send `text` instead; events as for `retry`."""
        ...

    def quote(self, text: str, reply: str, pin: bool) -> None:
        """Run a turn with a given reply, and pin it if `pin`; events as for `submit`, then `TurnPinned`."""
        ...

    def compact(self) -> None:
        """Summarize the turns to be evicted next; `SummaryReady` follows. The conversation does not change."""
        ...

    def open_session(self, session: str, agreed_model: str = "") -> None:
        """Resume a saved session: `ConversationResumed`, or a `Notice` of level 'error' with the reason why not.

        An imported session that names another model is opened only if `agreed_model` is that model.
        """
        ...

    @property
    def saving(self) -> bool:
        """Whether the cache is being written to the disk; closing waits for it."""
        ...

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop everything and end the thread; return whether it ended in time. May be called twice."""
        ...
