"""The reasoning of a reply, foldable to one line."""

from __future__ import annotations

from textual import events
from textual.containers import Vertical

from streamchat.base.thinking import word_count
from streamchat.frontend.messages import thought_for
from streamchat.tui.widgets.one_layout import OneLayout
from streamchat.tui.widgets.text import Verbatim


class Thinking(OneLayout, Vertical):
    """A heading above the text. Call `add` while reasoning is generated, then `finish`. A click folds or unfolds it."""

    def __init__(self, *, unfolded: bool) -> None:
        super().__init__(Verbatim("", classes="line"), Verbatim("", classes="thoughts"))
        self.text = ""
        self._done = False
        self.unfolded = unfolded

    def on_mount(self) -> None:
        """Show the reasoning so far."""
        self._show()

    def add(self, text: str) -> None:
        """Append reasoning."""
        self.text += text
        self._show()

    def finish(self) -> None:
        """Mark the reasoning as complete."""
        self._done = True
        self._show()

    def fold(self, folded: bool) -> None:
        """Fold or unfold the reasoning."""
        self.unfolded = not folded
        self._show()

    def on_click(self, event: events.Click) -> None:
        """Fold or unfold, unless the click ends a selection."""
        if not self.screen.get_selected_text():
            event.stop()
            self.fold(self.unfolded)

    def _show(self) -> None:
        if not self.is_mounted:
            return
        state = thought_for(self.text) if self._done else f"thinking · {word_count(self.text)}"
        self.query_one(".line", Verbatim).show(f"{'▾' if self.unfolded else '▸'} {state}")
        thoughts = self.query_one(".thoughts", Verbatim)
        thoughts.display = self.unfolded
        if self.unfolded:
            thoughts.show(self.text.strip())
