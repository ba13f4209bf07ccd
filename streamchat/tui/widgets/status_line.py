"""The status in one line, for narrow terminals."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

from streamchat.base.events import PrefillProgress
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import short_forms
from streamchat.tui.widgets.gauge import Gauge


class StatusLine(Horizontal):
    """Cache gauge, compressions, memory, tok/s."""

    def compose(self) -> ComposeResult:
        """The gauge and its text."""
        yield Gauge(id="line-gauge")
        yield Static("", id="line-text", markup=False)

    def show(self, board: StatusBoard, prefill: PrefillProgress | None = None) -> None:
        """Update the line."""
        self.query_one(Gauge).cache = board.cache
        text = " · ".join(short_forms(board, prefill)) if board.info is not None else "the model is loading"
        self.query_one("#line-text", Static).update(Content(text), layout=False)  # always one line

    @property
    def text(self) -> str:
        """The text next to the gauge."""
        return str(self.query_one("#line-text", Static).content)
