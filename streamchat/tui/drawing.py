"""Draws only the cells that change, and places the widgets once per layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import cast

from textual._compositor import ChopsUpdate, Compositor, ReflowResult
from textual.geometry import Offset, Region, Size
from textual.strip import Strip
from textual.widget import Widget

Chops = list[dict[int, Strip | None]]
"""For each row, the strip that starts at a column; None if no widget has drawn it yet."""


class SparseCompositor(Compositor):
    """Renders of each widget only the rows that change and that no widget in front of it covers.

    Textual renders all rows of every widget in the smallest rectangle around all changes. If a figure in the status
    panel changes together with the reply, that is the whole screen, and most rows belong to containers behind the text.
    """

    _wanted: Mapping[int, list[tuple[int, int]]] | None = None
    """For each row, spans of changed columns, [first, end); None for all."""

    def render_partial_update(self) -> ChopsUpdate | None:
        """Render the changed regions."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for y, first, end in self._regions_to_spans(self._dirty_regions):
            wanted.setdefault(y, []).append((first, end))
        self._wanted = wanted
        try:
            return super().render_partial_update()
        finally:
            self._wanted = None

    def _render_chops(self, crop: Region, is_rendered_line: Callable[[int], bool]) -> Sequence[Mapping[int, Strip]]:
        """Render the rows of `crop` that `is_rendered_line` accepts, front to back, until nothing is missing."""
        chops: Chops = [dict.fromkeys(cuts[:-1]) for cuts in self.cuts]
        missing = {
            y: self._columns(y) for y in range(max(0, crop.y), min(crop.bottom, len(chops))) if is_rendered_line(y)
        }
        for widget, (region, clip) in self.visible_widgets.items():
            shown = region.intersection(clip)
            rows = [y for y in shown.line_range if y in missing and _any_in(missing[y], *shown.column_span)]
            if rows:
                self._draw(widget, shown, shown.offset - region.offset, rows, chops, missing)
                if not missing:
                    break
        return cast("Sequence[Mapping[int, Strip]]", chops)

    def _columns(self, y: int) -> set[int]:
        """Return the start columns of the strips of row `y` that change."""
        cuts = self.cuts[y]
        if self._wanted is None:
            return set(cuts[:-1])
        spans = self._wanted.get(y, ())
        return {start for start, stop in pairwise(cuts) if any(start < end and stop > first for first, end in spans)}

    def _draw(
        self, widget: Widget, shown: Region, inner: Offset, rows: list[int], chops: Chops, missing: dict[int, set[int]]
    ) -> None:
        """Draw `rows` of the screen from `widget`.

        Args:
            shown: The visible part of the widget on the screen.
            inner: Its offset in the widget.
            missing: The strips to draw, by row; those drawn are removed.
        """
        top, bottom = rows[0], rows[-1] + 1
        strips = widget.render_lines(Region(inner.x, inner.y + top - shown.y, shown.width, bottom - top))
        left, right = shown.column_span
        for y in rows:
            cuts = [cut for cut in self.cuts[y] if left <= cut <= right]
            line, columns = chops[y], missing[y]
            for start, strip in zip(cuts, strips[y - top].divide([cut - left for cut in cuts[1:]]), strict=False):
                if start in columns:
                    line[start] = strip
                    columns.remove(start)
            if not columns:
                del missing[y]

    # --- places ----------------------------------------------------------------------------------------------------

    def reflow(self, parent: Widget, size: Size) -> ReflowResult:
        """Place all widgets. Textual would place them again when the place of a widget is looked up next."""
        result = super().reflow(parent, size)
        self._full_map_invalidated = False
        return result

    def update_widgets(self, widgets: set[Widget]) -> None:
        """Update `widgets`. Their places are still known; Textual would place all widgets again."""
        known = not self._full_map_invalidated and widgets <= self._full_map.keys()
        super().update_widgets(widgets)
        if known:
            self._full_map_invalidated = False


def _any_in(columns: Iterable[int], first: int, end: int) -> bool:
    return any(first <= column < end for column in columns)
