"""Screens that may be closed at any moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.events import Mount, Resize
from textual.message import Message

from streamchat.tui.screens.latest_size import LatestSize


class Closable(LatestSize):
    """Mixin for screens: ignores what arrives after the screen was closed. It stands before the class of Textual.

    Escape may be handled before the screen was drawn, or before the letters that were typed just before it, above all
    on a busy machine. The app may exit before the screen was drawn. The widgets are then gone, or are never created,
    and a handler that looks for them would end the app with an error.
    """

    if TYPE_CHECKING:
        is_mounted: bool

    @property
    def is_gone(self) -> bool:
        """Whether the screen was closed, or the app exits."""
        stack: list[object] = [*self.app.screen_stack]
        return self not in stack or self.app._exit

    @property
    def has_widgets(self) -> bool:
        """Whether the widgets of the screen exist."""
        return self.is_mounted and not self.is_gone

    async def _dispatch_message(self, message: Message) -> None:
        # what bubbles comes from widgets; what does not, such as `Unmount`, removes the screen
        if not (self.is_gone and (message.bubble or isinstance(message, Mount | Resize))):
            await super()._dispatch_message(message)
