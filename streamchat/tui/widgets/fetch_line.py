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

    def show_switch(self, switch: ModelSwitch) -> None:
        """Show what `switch` does."""
        self.display = switch.is_active
        self.show(f"{switch.text} · {hint(self.app, 'chat.stop')} cancels" if switch.is_active else "")
