"""A scrolling column of turns, with the context edge between them."""

from __future__ import annotations

from collections.abc import Mapping

from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.layout import DockArrangeResult
from textual.widget import Widget

from streamchat.base.events import CacheState
from streamchat.config.settings import Thinking
from streamchat.frontend.visibility import ContextView
from streamchat.tui.widgets.backdrop import Backdrop
from streamchat.tui.widgets.edge import ContextEdge
from streamchat.tui.widgets.one_layout import OneLayout
from streamchat.tui.widgets.turn import Turn


class TurnColumn(Backdrop, OneLayout, VerticalScroll, can_focus=False):
    """What `Conversation` and its `MountedTurns` share: how turns are shown, and where the context edge is."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's word
        super().__init__(id=id)
        self.model = "assistant"
        """Heading of the replies."""
        self.thinking: Thinking = "collapse"
        """How reasoning is displayed."""
        self.context_view = ContextView(CacheState())
        """Which turns are in context."""
        self._edge: ContextEdge | None = None

    @property
    def following(self) -> bool:
        """Whether new text scrolls into view."""
        return self.is_anchored and not self._anchor_released

    def arrange(self, size: Size, optimal: bool = False) -> DockArrangeResult:
        """Place the turns. While the view follows the end, those more than a screen above it sleep."""
        result = super().arrange(size, optimal)
        awake_from = result.total_region.bottom - 2 * size.height if self.following else 0
        for placement in result.placements:
            if isinstance(placement.widget, Turn):
                if placement.region.bottom < awake_from:
                    placement.widget.sleep(placement.region.size)
                else:
                    placement.widget.wake()
        return result

    async def place_edge(self, turns: Mapping[int, Turn]) -> None:
        """Place the context edge before the first turn of the window; removes it if nothing was evicted.

        Args:
            turns: Mounted turns by number.
        """
        first = turns.get(self.context_view.oldest)
        evicted = [number for number in turns if self.context_view.turn(number).evicted]
        known = first is not None and (evicted or not self.context_view.turn(self.context_view.oldest).complete)
        if not known or first is None:
            if self._edge is not None:
                await self._edge.remove()
                self._edge = None
            return
        if self._edge is None:
            self._edge = ContextEdge()
            await self.mount(self._edge, before=first)
        elif self.widget_after(self._edge) is not first:
            self.move_child(self._edge, before=first)
        self._edge.show(partly=not self.context_view.turn(self.context_view.oldest).complete)

    def widget_after(self, widget: Widget) -> Widget | None:
        """The widget right below `widget`; None for the last one."""
        at = self.children.index(widget) + 1
        return self.children[at] if at < len(self.children) else None
