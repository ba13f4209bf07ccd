"""Cache usage as one bar: sinks, pinned, window, free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

from streamchat.base.events import CacheState

PARTS = ("sinks", "pinned", "window", "free")
FULL, EMPTY = "█", "░"


@dataclass(frozen=True)
class GaugePart:
    """One part of the cache budget."""

    name: str
    tokens: int


def parts_of(cache: CacheState) -> list[GaugePart]:
    """The parts of the cache budget, in order."""
    free = max(0, cache.cache_size - cache.length)
    counts = (cache.sinks, cache.pinned, cache.window, free)
    return [GaugePart(name, count) for name, count in zip(PARTS, counts, strict=True)]


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

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's word
        super().__init__(id=id)
        self._cache = CacheState()

    @property
    def cache(self) -> CacheState:
        """The state that is shown."""
        return self._cache

    def show(self, cache: CacheState) -> None:
        """Show another state."""
        if cache != self._cache:
            self._cache = cache
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """The bar; all lines are the same."""
        width = self.content_size.width
        parts = parts_of(self._cache)
        cells = share_cells([part.tokens for part in parts], width)
        if not any(cells):
            parts, cells = [GaugePart("free", 0)], [width]
        segments = []
        for part, count in zip(parts, cells, strict=True):
            style: Style = self.get_component_rich_style(f"gauge--{part.name}")
            segments.append(Segment((EMPTY if part.name == "free" else FULL) * count, style))
        return Strip(segments, width)
