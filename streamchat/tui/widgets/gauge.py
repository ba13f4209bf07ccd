"""Cache usage as one bar: sinks, pinned, window, free."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from streamchat.base.events import CacheState

PARTS = ("sinks", "pinned", "window", "free")
FULL, EMPTY = "█", "░"


def share_cells(counts: list[int], width: int) -> list[int]:
    """Divide `width` cells in proportion to `counts`; each nonzero count gets at least one cell if there is room."""
    total = sum(counts)
    if not total or width <= 0:
        return [0] * len(counts)
    present = [index for index, count in enumerate(counts) if count]
    exact = [count * width / total for count in counts]
    cells = [int(share) for share in exact]
    if width >= len(present):
        for index in present:
            cells[index] = max(1, cells[index])
    by_need = sorted(present, key=lambda index: exact[index] - cells[index])
    while sum(cells) < width:
        index = by_need.pop()
        cells[index] += 1
        by_need.insert(0, index)
    while sum(cells) > width:
        cells[max(present, key=lambda index: cells[index])] -= 1
    return cells


class Gauge(Widget):
    """The bar. Colors come from the style sheet, by component class."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"gauge--{name}" for name in PARTS}

    cache = reactive(CacheState())
    """The state that is shown."""

    def render_line(self, y: int) -> Strip:
        """The bar; all lines are the same."""
        width, cache = self.content_size.width, self.cache
        free = max(0, cache.cache_size - cache.length)
        cells = share_cells([cache.sinks, cache.pinned, cache.window, free], width)
        if not any(cells):
            cells[-1] = width
        segments = []
        for name, count in zip(PARTS, cells, strict=True):
            style = self.get_component_rich_style(f"gauge--{name}")
            segments.append(Segment((EMPTY if name == "free" else FULL) * count, style))
        return Strip(segments, width)
