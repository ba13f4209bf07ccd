"""A column of turns that scrolls, and the edge of memory between them."""

from __future__ import annotations

from collections.abc import Mapping

from textual.containers import VerticalScroll
from textual.widget import Widget

from streamchat.base.events import CacheState
from streamchat.config.settings import Thinking
from streamchat.frontend.visibility import Visible
from streamchat.tui.widgets.edge import MemoryEdge
from streamchat.tui.widgets.turn import Turn


class TurnColumn(VerticalScroll, can_focus=False):
    """What `Conversation` and its `Stretch` share: how turns are shown, and where the edge of memory is."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's word
        super().__init__(id=id)
        self.model = "assistant"
        """Name over the replies."""
        self.thinking: Thinking = "collapse"
        """What is shown of a reply's reasoning."""
        self.sight = Visible(CacheState())
        """What the model sees, by turn."""
        self._edge: MemoryEdge | None = None

    @property
    def following(self) -> bool:
        """New text scrolls into view by itself."""
        return self.is_anchored and not self._anchor_released

    async def place_edge(self, turns: Mapping[int, Turn]) -> None:
        """Put the edge of memory before the first turn of the window; away where nothing was forgotten.

        Args:
            turns: Those that are mounted, by number.
        """
        first = turns.get(self.sight.oldest)
        forgotten = [number for number in turns if self.sight.turn(number).forgotten]
        known = first is not None and (forgotten or not self.sight.turn(self.sight.oldest).whole)
        if not known or first is None:
            if self._edge is not None:
                await self._edge.remove()
                self._edge = None
            return
        if self._edge is None:
            self._edge = MemoryEdge()
            await self.mount(self._edge, before=first)
        elif self.widget_after(self._edge) is not first:
            self.move_child(self._edge, before=first)
        self._edge.show(partly=not self.sight.turn(self.sight.oldest).whole)

    def widget_after(self, widget: Widget) -> Widget | None:
        """What stands right below."""
        at = self.children.index(widget) + 1
        return self.children[at] if at < len(self.children) else None
