"""The part of the app that the chat screen uses, as a protocol."""

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
