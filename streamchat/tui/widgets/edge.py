"""The edge of memory: a line between what the model has forgotten and what it still sees."""

from __future__ import annotations

from rich.segment import Segment
from textual.strip import Strip
from textual.widget import Widget


class MemoryEdge(Widget):
    """A rule with words in its middle; `show` changes the words."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def show(self, partly: bool) -> None:
        """`partly`: the first turn below is seen only in part."""
        text = "the model sees from somewhere in this turn on" if partly else "the model sees from here on"
        if text != self.text:
            self.text = text
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """The rule, as wide as there is room."""
        width = self.content_size.width
        words = f" {self.text} " if width > len(self.text) + 6 else ""
        left = (width - len(words)) // 2
        line = "╌" * left + words + "╌" * (width - len(words) - left)
        return Strip([Segment(line[:width], self.rich_style)], width)
