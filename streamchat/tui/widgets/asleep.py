"""Turns out of view: they keep their height, and their content is left out of every layout."""

from __future__ import annotations

from textual.containers import Vertical
from textual.geometry import Size, Spacing
from textual.layout import DockArrangeResult


class Sleeper(Vertical):
    """A container that its parent can put to sleep while it is out of view.

    The time of a layout grows with the number of placed widgets, and a turn has about ten of them. A layout while a
    reply streams must not depend on how many turns there are above.
    """

    _height: int | None = None
    """Rows of the content while asleep; None while awake."""
    _width = 0
    """Columns for which `_height` is valid."""

    @property
    def asleep(self) -> bool:
        """Whether the content is left out of the layout."""
        return self._height is not None

    def sleep(self, size: Size) -> None:
        """Remember the `size` of the content, and leave the content out of the next layouts."""
        if not self.asleep:
            self._width, self._height = size

    def wake(self) -> None:
        """Place the content again, from the layout in progress on."""
        if self.asleep:
            self._height = None
            self.refresh(layout=True)  # the content may have changed meanwhile

    def arrange(self, size: Size, optimal: bool = False) -> DockArrangeResult:
        """Place the content; nothing while asleep."""
        if self.asleep:
            return DockArrangeResult([], set(), Spacing())
        return super().arrange(size, optimal)

    def _clear_arrangement_cache(self) -> None:
        """Wake up because the content has changed: the next layout finds the new height."""
        super()._clear_arrangement_cache()
        self._height = None

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the rows of the content at `width` columns. Another width than that of the content wakes it."""
        if self._height is not None:
            if width == self._width:
                return self._height
            self.wake()
        return super().get_content_height(container, viewport, width)
