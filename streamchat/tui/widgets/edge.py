"""The context edge: a line between evicted turns and those still in context."""

from __future__ import annotations

from rich.segment import Segment
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget


class ContextEdge(Widget):
    """A horizontal rule with a label."""

    text = reactive("")

    def show(self, partly: bool) -> None:
        """Set the label; `partly`: the first turn below the edge was partly evicted."""
        self.text = "context starts inside this turn" if partly else "context starts here"

    def render_line(self, y: int) -> Strip:
        """The rule across the full width."""
        width = self.content_size.width
        words = f" {self.text} " if width > len(self.text) + 6 else ""
        left = (width - len(words)) // 2
        line = "╌" * left + words + "╌" * (width - len(words) - left)
        return Strip([Segment(line[:width], self.rich_style)], width)
