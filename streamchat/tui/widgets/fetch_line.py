"""The model that is being fetched while the chat continues, above the input."""

from __future__ import annotations

from streamchat.frontend.model_switch import ModelSwitch
from streamchat.tui.bindings import hint
from streamchat.tui.widgets.text import Verbatim


class FetchLine(Verbatim):
    """One line of progress and the key that cancels it. Hidden if nothing is fetched."""

    def __init__(self) -> None:
        super().__init__("", id="fetch")
        self.display = False

    def show_switch(self, switch: ModelSwitch, *, can_cancel: bool) -> None:
        """Show what `switch` does, and the key that cancels it if that key has nothing else to do."""
        self.display = switch.is_active
        key = f" · {hint(self.app, 'chat.stop')} cancels" if can_cancel else ""
        self.show(f"{switch.text}{key}" if switch.is_active else "")
