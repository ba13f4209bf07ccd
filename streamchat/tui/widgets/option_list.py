"""Lists whose options may change between a click and its handling."""

from __future__ import annotations

from textual import events
from textual.command import CommandList
from textual.widgets import OptionList


class Options(OptionList):
    """A list that ignores a click on an option that is gone; Textual ends the app then."""

    async def _on_click(self, event: events.Click) -> None:
        clicked = event.style.meta.get("option")
        if clicked is not None and clicked >= self.option_count:
            event.prevent_default()


class Commands(CommandList):
    """The list of the command palette, which ignores such a click too."""

    _on_click = Options._on_click
