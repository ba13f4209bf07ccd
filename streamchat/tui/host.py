"""What the chat screen needs of the app around it."""

from __future__ import annotations

from typing import Protocol

from streamchat.base import events as ev
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend.slash.registry import SlashRegistry
from streamchat.frontend.status import StatusBoard


class ChatHost(Protocol):
    """The app of a `ChatScreen`."""

    engine: ChatEngine
    board: StatusBoard
    registry: SlashRegistry
    watching: bool
    """Another component sends the messages; the user only reads."""

    @property
    def config_notice(self) -> str:
        """What the user must know about `./config.toml`; '' for nothing."""
        ...

    def keys_of(self, key_id: str) -> str:
        """Names of the keys for something, as configured."""
        ...

    def model_ready(self) -> None:
        """The model is loaded."""
        ...

    def engine_failed(self, event: ev.EngineFailed) -> None:
        """The engine has ended."""
        ...

    def action_interrupt(self) -> None:
        """Quit on a second press."""
        ...

    async def action_quit(self) -> None:
        """Close the engine, then end."""
        ...
