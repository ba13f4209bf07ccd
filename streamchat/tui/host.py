"""The app as the chat screen sees it, and the screen as its parts see it, as protocols."""

from __future__ import annotations

from typing import Protocol

from streamchat.base import events as ev
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend.slash.registry import SlashRegistry
from streamchat.frontend.status import StatusBoard
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.prompt import Prompt
from streamchat.tui.widgets.queue_panel import QueuePanel


class ChatHost(Protocol):
    """The app of a `ChatScreen`."""

    engine: ChatEngine
    board: StatusBoard
    registry: SlashRegistry
    watching: bool
    """Another component sends the messages; the user only reads."""

    @property
    def config_notice(self) -> str:
        """Notice about `./config.toml`; '' for none."""
        ...

    def keys_of(self, key_id: str) -> str:
        """The configured keys for a key id."""
        ...

    def model_ready(self) -> None:
        """React to the loaded model."""
        ...

    def engine_failed(self, event: ev.EngineFailed) -> None:
        """React to a failed engine."""
        ...

    def action_interrupt(self) -> None:
        """Quit on a second press."""
        ...

    async def action_quit(self) -> None:
        """Close the engine, then exit."""
        ...


class ChatView(Protocol):
    """The mounted chat screen."""

    @property
    def prompt(self) -> Prompt:
        """The input."""
        ...

    @property
    def queue_panel(self) -> QueuePanel:
        """The queued messages."""
        ...

    @property
    def conversation(self) -> Conversation:
        """The conversation."""
        ...

    async def show_sent(self, text: str) -> None:
        """Show a message in the conversation when it is sent."""
        ...

    def show_keys(self) -> None:
        """Show the keys that work now."""
        ...

    def toast(self, text: str, level: str) -> None:
        """Show a message that disappears."""
        ...
