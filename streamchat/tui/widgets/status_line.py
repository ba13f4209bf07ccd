"""The status in one line, for narrow terminals."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

from streamchat.base.events import PrefillProgress
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import short_forms
from streamchat.tui.widgets.gauge import Gauge

TEXT_AT = 17
"""Columns of the gauge and its margin, as in the style sheet."""
SEPARATOR = " · "
LEFT_OUT = (1, 2)
"""Which of the short forms are left out, in this order, where they do not all fit: compressions, memory."""


def fitting(forms: Sequence[str], width: int) -> str:
    """Join the short forms; leave out the least useful if the line would be longer than `width` columns."""
    left_out: set[int] = set()
    for index in (None, *LEFT_OUT):
        left_out |= set() if index is None else {index}
        text = SEPARATOR.join(form for at, form in enumerate(forms) if at not in left_out)
        if cell_len(text) <= width:
            break
    return text


class StatusLine(Horizontal):
    """Cache gauge, compressions, memory, tok/s: as many as fit."""

    _forms: Sequence[str] = ()

    def compose(self) -> ComposeResult:
        """The gauge and its text."""
        yield Gauge(id="line-gauge")
        yield Static("", id="line-text", markup=False)

    def show(self, board: StatusBoard, prefill: PrefillProgress | None = None) -> None:
        """Update the line."""
        self.query_one(Gauge).cache = board.cache
        self._forms = short_forms(board, prefill) if board.info is not None else ["the model is loading"]
        self._show_text()

    def on_resize(self) -> None:
        """Show what fits at the new width."""
        self._show_text()

    def _show_text(self) -> None:
        static = self.query_one("#line-text", Static)
        static.update(Content(fitting(self._forms, self.content_size.width - TEXT_AT)), layout=False)  # always one line

    @property
    def text(self) -> str:
        """The text next to the gauge."""
        return str(self.query_one("#line-text", Static).content)
