"""Literal text of users, models and errors: never parsed as markup, folded if long."""

from __future__ import annotations

from textual import events
from textual.content import Content
from textual.widgets import Static

from streamchat.base.formatting import plural
from streamchat.base.sanitize import printable
from streamchat.tui.widgets.one_layout import OneLayout

ROW = 200
"""Characters that count as one row of a long line."""


class Verbatim(OneLayout, Static):
    """Literal text."""

    def __init__(self, text: str = "", *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002
        self.text = printable(text)
        super().__init__(Content(self.text), markup=False, id=id, classes=classes)

    def show(self, text: str) -> None:
        """Replace the text."""
        text = printable(text)
        if text != self.text:
            self.text = text
            self.update(Content(text))


class Folded(Static):
    """Text that shows only its first lines until it is clicked.

    Args:
        lines: Number of lines when folded.
    """

    def __init__(self, text: str, *, lines: int, classes: str | None = None) -> None:
        self.text = printable(text)
        self._lines = lines
        self._open = False
        super().__init__(self._shown(), markup=False, classes=classes)

    def on_click(self, event: events.Click) -> None:
        """Fold or unfold; a click that ends a selection does neither."""
        if self._hidden() and not self.screen.get_selected_text():
            event.stop()
            self._open = not self._open
            self.update(self._shown())

    def _hidden(self) -> int:
        """Number of rows hidden when folded."""
        return sum(map(_rows, self.text.split("\n"))) - self._lines

    def _shown(self) -> Content:
        hidden = self._hidden()
        if hidden <= 1:
            return Content(self.text)
        if self._open:
            return Content.assemble(self.text, ("\n▴ click to collapse", "$foreground 60% italic"))
        rest = f"\n▾ {plural(hidden, 'more line')}; click to show them"
        return Content.assemble(self._head(), (rest, "$foreground 60% italic"))

    def _head(self) -> str:
        left, shown = self._lines, []
        for line in self.text.split("\n"):
            if left <= 0:
                break
            shown.append(line[: left * ROW])
            left -= _rows(line)
        return "\n".join(shown)


def _rows(line: str) -> int:
    return max(1, -(-len(line) // ROW))
