"""The context map: the cache budget as a bar over several rows, with a segment per cached message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment as Cells
from textual import events
from textual.binding import BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from streamchat.base.events import CacheState, Segment
from streamchat.base.formatting import plural
from streamchat.tui.bindings import bind
from streamchat.tui.widgets.gauge import share_cells

ROWS = 6
FULL, FIRST, FREE = "█", "▐", "·"
"""A cell, the first cell of a segment (with a gap before it), and a free cell."""
STYLES = ("sinks", "system", "pinned", "recalled", "user", "assistant", "free", "chosen")


@dataclass(frozen=True)
class MapCell:
    """A run of cells for one segment."""

    segment: Segment | None
    """None = free cells."""
    first: int
    stop: int


def layout(cache: CacheState, cells: int) -> list[MapCell]:
    """Divide `cells` among the segments and the free slots, in slot order, in proportion to their tokens."""
    free = max(0, cache.cache_size - cache.length)
    parts: list[Segment | None] = [*cache.segments, None]
    counts = share_cells([*(segment.tokens for segment in cache.segments), free], cells)
    shown, at = [], 0
    for part, count in zip(parts, counts, strict=True):
        if count:
            shown.append(MapCell(part, at, at + count))
        at += count
    return shown


def style_of(segment: Segment | None) -> str:
    """Component class of a segment."""
    if segment is None:
        return "free"
    if segment.part in ("sinks", "system"):
        return segment.part
    if segment.pinned:
        return "pinned"
    return "recalled" if segment.recalled else segment.part


def describe(shown: MapCell | None, cache: CacheState) -> str:
    """Description of a run of cells; '' for None."""
    if shown is None:
        return ""
    segment = shown.segment
    if segment is None:
        return f"free · {plural(cache.cache_size - cache.length, 'token')}"
    tokens = plural(segment.tokens, "token")
    if segment.part == "sinks":
        return f"attention sinks · {tokens}"
    if segment.part == "system":
        return f"system prompt · {tokens}"
    who = "you" if segment.part == "user" else "reply"
    if segment.tokens < segment.total:
        tokens = f"{segment.tokens:,} of {segment.total:,} tokens"
    state = " · pinned" if segment.pinned else " · recalled" if segment.recalled else ""
    return f"turn {segment.turn} · {who} · {tokens}{state}"


class ContextMap(Widget, can_focus=True):
    """The map. Arrow keys or the mouse select a segment; Enter or a click goes to its message."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"map--{name}" for name in STYLES}
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("map.left", "move(-1)"),
        bind("map.right", "move(1)"),
        bind("map.up", "move_row(-1)"),
        bind("map.down", "move_row(1)"),
        bind("map.open", "open", show=True),
        bind("map.pin", "pin", show=True),
        bind("map.leave", "leave", show=True),
    ]

    @dataclass
    class TurnRequested(Message):
        """Go to the message of a segment."""

        turn: int

    @dataclass
    class PinRequested(Message):
        """Pin or unpin a turn."""

        turn: int
        pinned: bool

    @dataclass
    class Chosen(Message):
        """Another segment was selected; `description` describes it."""

        description: str

    class Closed(Message):
        """Return the focus to the input."""

    cache = reactive(CacheState())
    """The state that is shown."""
    _chosen: tuple[str, int] | None = None
    """(part, turn) of the selected segment; ('free', 0) for the free cells."""

    # --- content --------------------------------------------------------------------------------------------

    def watch_cache(self) -> None:
        """Describe the selected segment again."""
        if self._chosen is not None:
            self._post_selection()

    def choose_turn(self, turn: int) -> None:
        """Select the first segment of a turn; clears the selection if the turn was evicted."""
        self._choose(next((s for s in self._layout() if s.segment and s.segment.turn == turn), None))

    @property
    def chosen(self) -> MapCell | None:
        """The selected run of cells; None for none."""
        return next((shown for shown in self._layout() if self._key(shown) == self._chosen), None)

    @property
    def description(self) -> str:
        """Description of the selection."""
        return describe(self.chosen, self.cache)

    def _layout(self) -> list[MapCell]:
        return layout(self.cache, max(1, self.content_size.width) * ROWS)

    @staticmethod
    def _key(shown: MapCell) -> tuple[str, int]:
        return ("free", 0) if shown.segment is None else (shown.segment.part, shown.segment.turn)

    def _choose(self, shown: MapCell | None) -> None:
        self._chosen = None if shown is None else self._key(shown)
        self.refresh()
        self._post_selection()

    def _post_selection(self) -> None:
        self.post_message(self.Chosen(self.description))

    def render_line(self, y: int) -> Strip:
        """One row of the bar."""
        width = self.content_size.width
        start, stop = y * width, (y + 1) * width
        cells: list[Cells] = []
        for shown in self._layout():
            first, last = max(shown.first, start), min(shown.stop, stop)
            if first >= last:
                continue
            name = "chosen" if self._chosen == self._key(shown) else style_of(shown.segment)
            style = self.get_component_rich_style(f"map--{name}")
            mark = FREE if shown.segment is None else FULL
            text = mark * (last - first)
            if shown.segment is not None and first == shown.first and first > start:
                text = FIRST + text[1:]
            cells.append(Cells(text, style))
        return Strip(cells, width).adjust_cell_length(width)

    def get_content_height(self, *args: object, **kwargs: object) -> int:
        """A fixed number of rows."""
        return ROWS

    # --- keys and mouse -------------------------------------------------------------------------------------

    def on_focus(self) -> None:
        """Select the newest turn if nothing is selected."""
        if self.chosen is None:
            turns = [shown for shown in self._layout() if shown.segment and shown.segment.turn]
            self._choose(turns[-1] if turns else next(iter(self._layout()), None))

    def on_blur(self) -> None:
        """Clear the selection."""
        self._choose(None)

    def action_move(self, by: int) -> None:
        """Select the segment before or after."""
        runs = self._layout()
        if not runs:
            return
        keys = [self._key(shown) for shown in runs]
        at = keys.index(self._chosen) if self._chosen in keys else len(keys) - 1
        self._choose(runs[max(0, min(len(runs) - 1, at + by))])

    def action_move_row(self, by: int) -> None:
        """Select the segment a row above or below."""
        chosen = self.chosen
        if chosen is not None:
            self._choose(
                self._at((chosen.first + chosen.stop - 1) // 2 + by * max(1, self.content_size.width)) or chosen
            )

    def action_open(self) -> None:
        """Go to the message of the selected segment."""
        chosen = self.chosen
        if chosen is not None and chosen.segment is not None and chosen.segment.turn:
            self.post_message(self.TurnRequested(chosen.segment.turn))

    def action_pin(self) -> None:
        """Pin or unpin the selected turn."""
        chosen = self.chosen
        if chosen is not None and chosen.segment is not None and chosen.segment.turn:
            self.post_message(self.PinRequested(chosen.segment.turn, not chosen.segment.pinned))

    def action_leave(self) -> None:
        """Return the focus to the input."""
        self.post_message(self.Closed())

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Select the segment under the mouse."""
        self._choose(self._under(event))

    def on_leave(self) -> None:
        """Clear the selection if only the mouse set it."""
        if not self.has_focus:
            self._choose(None)

    def on_click(self, event: events.Click) -> None:
        """Go to the message of the clicked segment."""
        event.stop()
        self._choose(self._under(event))
        self.action_open()

    def _under(self, event: events.MouseEvent) -> MapCell | None:
        offset = event.get_content_offset(self)
        return None if offset is None else self._at(offset.y * self.content_size.width + offset.x)

    def _at(self, cell: int) -> MapCell | None:
        return next((shown for shown in self._layout() if shown.first <= cell < shown.stop), None)
