"""The app as the chat screen sees it, and the screen as its parts see it, as protocols."""

from __future__ import annotations

from typing import Any, Protocol

from textual.app import App

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

    @property
    def can_suspend(self) -> bool:
        """Whether the terminal can be given back to the shell."""
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

    def action_open_help(self) -> None:
        """Show keys and commands."""
        ...

    async def action_quit(self) -> None:
        """Close the engine, then exit."""
        ...


class ChatView(Protocol):
    """The chat screen."""

    chat_app: ChatHost
    queue_panel: QueuePanel

    @property
    def app(self) -> App[Any]:
        """The app, as Textual's class."""
        ...

    @property
    def prompt(self) -> Prompt:
        """The input."""
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

    def run_slash(self, text: str) -> None:
        """Run a command as if the user had typed it."""
        ...

    def toast(self, text: str, level: str) -> None:
        """Show a message that disappears."""
        ...
