"""Containers of a growing reply: one of their rows is rendered, and their children are arranged once per growth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.geometry import Region, Size
from textual.layout import DockArrangeResult
from textual.strip import Strip
from textual.widget import Widget

if TYPE_CHECKING:
    _Base = Widget
else:
    _Base = object  # Textual inherits styles from the first base that is a widget


class Backdrop(_Base):
    """A mixin, before the Textual class, for a container that shows only a background and what is at its sides.

    Each growth of a container clears its rendered rows, and Textual would style every visible one again.
    """

    def render_lines(self, crop: Region) -> list[Strip]:
        """Render the part `crop` of the widget."""
        gutter = self.styles.gutter
        if crop.height <= 1 or gutter.top or gutter.bottom:
            return super().render_lines(crop)
        return super().render_lines(crop.grow((0, 0, 1 - crop.height, 0))) * crop.height


class Column(Backdrop):
    """A mixin, before the Textual class, for a container as high as its children, which are below each other.

    The places of the children then depend on the width only. Textual arranges them for each height that the container
    had before, gets, and is asked for: up to three times per growth.
    """

    def arrange(self, size: Size, optimal: bool = False) -> DockArrangeResult:
        """Place the children."""
        return super().arrange(Size(size.width, self.screen.size.height), optimal)
