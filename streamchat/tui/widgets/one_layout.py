"""Widgets that grow with a reply: one layout of the screen for each growth, not two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.geometry import Size
from textual.widget import Widget

if TYPE_CHECKING:
    _Base = Widget
else:
    _Base = object  # Textual inherits styles from the first base that is a widget


class OneLayout(_Base):
    """A mixin, before the Textual class: a new size, found by a layout, does not request another layout.

    Textual stores the size of the content in `virtual_size`, and each change of it requests a layout of the whole
    screen. But the layout that found the size has already placed everything. A new size can only change whether
    scrollbars are shown, and showing one requests its own layout.
    """

    def _size_updated(self, size: Size, virtual_size: Size, container_size: Size, layout: bool = True) -> bool:
        """Store the sizes found by a layout; return whether they changed."""
        return super()._size_updated(size, virtual_size, container_size, layout=False)
