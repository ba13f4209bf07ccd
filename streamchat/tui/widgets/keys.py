"""A table of keys or commands with their descriptions."""

from __future__ import annotations

from collections.abc import Iterable

from textual.app import ComposeResult
from textual.containers import Grid

from streamchat.tui.widgets.text import Verbatim


class KeyTable(Grid):
    """Two columns, shown literally."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self._rows = list(rows)

    def compose(self) -> ComposeResult:
        """One widget per cell."""
        for key, text in self._rows:
            yield Verbatim(key, classes="key")
            yield Verbatim(text)
