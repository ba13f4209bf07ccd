"""The requests that a front end sends to the engine: small frozen dataclasses.

`ChatEngine.send` queues them in order; the engine answers with events. Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

SettingValue = str | int | float | bool
"""Value of a setting that can change during a chat."""


@dataclass(frozen=True)
class Submit:
    """Reply to a user message: `TurnStarted` ... `TurnFinished`. Allowed before `ModelReady`."""

    text: str


@dataclass(frozen=True)
class Retry:
    """Undo the newest turn and reply to its message again: `TurnUndone`, then as for `Submit`.

    Without a turn, or if one of `turns` does not exist or is in context already, the only event is a `TurnFinished`
    with an error.
    """

    turns: tuple[int, ...] = ()
    """Numbers of evicted turns to recall for the reply: `TurnsRecalled`, and a `Notice` about those that are not."""


@dataclass(frozen=True)
class Edit:
    """Undo the newest turn and reply to `text` instead; events as for `Retry`."""

    text: str


@dataclass(frozen=True)
class Quote:
    """Run a turn with a given reply; events as for `Submit`, then `TurnPinned` if `pin`.

    If `turn` is given, that turn is paged in instead if that is possible: only `TurnPagedIn`. If not, a `Notice` with
    the reason comes first.
    """

    text: str
    reply: str
    pin: bool
    turn: int = 0
    """The turn of this conversation that `text` quotes; 0 for none, or to quote it as text."""


@dataclass(frozen=True)
class Compact:
    """Summarize the turns to be evicted next: `SummaryReady`. The conversation does not change."""


@dataclass(frozen=True)
class Stop:
    """Stop the running turn, or the first queued one, at once and without waiting in the queue.

    Text that was shown is kept; a turn without any is rolled back.
    """


@dataclass(frozen=True)
class Undo:
    """Undo the newest turn: `TurnUndone`, or a `Notice` with the reason why not."""

    to_edit: bool = False
    """The user wants to edit the message; passed on with the event."""


@dataclass(frozen=True)
class Rewind:
    """Undo all turns after turn `turn`: `TurnUndone` for each, then `ConversationRewound`.

    A fork of the session keeps these turns. If the request is refused, the only event is a `Notice` that says why.
    """

    turn: int
    drop: bool = False
    """Rewind even if the conversation is not saved, which loses the later turns."""


@dataclass(frozen=True)
class Fork:
    """Continue after turn `turn` in a new session: events as for `OpenSession`.

    The current session does not change. If it cannot be forked, the only event is a `Notice` that says why.
    """

    turn: int = 0
    """0 for the newest turn."""


@dataclass(frozen=True)
class Clear:
    """Clear the conversation; keep model, system prompt and settings: `ConversationCleared`."""


@dataclass(frozen=True)
class SetSystemPrompt:
    """Start over with another system prompt, pinned at the start of the cache: `ConversationCleared`."""

    text: str


@dataclass(frozen=True)
class SetOption:
    """Change a live setting from the next turn on: `SettingChanged`, or a `Notice` with the reason why not."""

    name: str
    value: SettingValue


@dataclass(frozen=True)
class ResetOption:
    """Set a live setting to its default, or to what the model's makers advise; events as for `SetOption`."""

    name: str


@dataclass(frozen=True)
class Pin:
    """Pin a turn in the cache: `TurnPinned`, or a `Notice` with the reason why not."""

    turn: int


@dataclass(frozen=True)
class Unpin:
    """Unpin a turn: `TurnPinned`, or a `Notice` with the reason why not."""

    turn: int


@dataclass(frozen=True)
class SwitchModel:
    """Load another model and start over with it: `ModelLoading` ... `ConversationCleared`, `ModelReady`.

    If it cannot be loaded, a `Notice` says why, and the conversation continues with the old model.
    """

    name: str


@dataclass(frozen=True)
class FetchModel:
    """Fetch a model onto this machine while the chat continues: `ModelFetching` ... `ModelFetched`.

    Starts at once, without waiting in the queue. A fetch that is running is canceled first. Loads nothing.
    """

    name: str


@dataclass(frozen=True)
class CancelFetch:
    """Cancel the fetch of a model, if one is running: `ModelFetched`. What was fetched stays for the next try."""


@dataclass(frozen=True)
class CountTokens:
    """Count the tokens of a text: `TextCounted`, once the engine is idle."""

    text: str


@dataclass(frozen=True)
class OpenSession:
    """Resume a saved session: `ConversationResumed`, or a `Notice` of level 'error' with the reason why not."""

    session: str
    agreed_model: str = ""
    """The model that the user agreed to load, if only an imported file named it."""


@dataclass(frozen=True)
class Save:
    """Save the conversation from now on, if nothing is saved yet: `SessionOpened` once it has a turn.

    A `Notice` of level 'error' gives the reason why not.
    """


@dataclass(frozen=True)
class SetTitle:
    """Change the title of the saved session: a `Notice`, of level 'warning' with the reason if it cannot be changed."""

    text: str


TurnRequest = Submit | Retry | Edit | Quote | Compact
"""Requests that run the model. The engine is busy until they are done, and `Stop` cancels them."""
Request = (
    TurnRequest
    | Stop
    | Undo
    | Rewind
    | Fork
    | Clear
    | SetSystemPrompt
    | SetOption
    | ResetOption
    | Pin
    | Unpin
    | SwitchModel
    | FetchModel
    | CancelFetch
    | CountTokens
    | OpenSession
    | Save
    | SetTitle
)
"""Every request. `Owner.handle` must have a case for each; mypy reports a missing one."""
