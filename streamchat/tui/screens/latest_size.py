"""Screens whose terminal may change its size faster than they are laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textual.events import Resize
from textual.message import Message

if TYPE_CHECKING:
    from textual.app import App


class LatestSize:
    """Mixin for screens: skips sizes that the terminal no longer has. It stands before the class of Textual.

    A layout takes up to a second in a long conversation on a busy machine. Textual merges sizes only if no other
    message is between them, so a screen could spend minutes on old sizes, while everything else waited behind them. The
    app sends the newest size after the others.
    """

    if TYPE_CHECKING:
        app: App[Any]

    async def _dispatch_message(self, message: Message) -> None:
        if not isinstance(message, Resize) or message.size == self.app.size:
            await super()._dispatch_message(message)  # type: ignore[misc]
