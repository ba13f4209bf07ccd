"""Selects the mounted turns: those around the view and the newest ones. Placeholder lines count the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from textual.message import Message
from textual.widget import Widget

from streamchat.base.formatting import plural
from streamchat.tui.transcript import FinishedTurn, TranscriptHistory
from streamchat.tui.widgets.edge import ContextEdge
from streamchat.tui.widgets.lines import SystemPrompt
from streamchat.tui.widgets.text import Verbatim
from streamchat.tui.widgets.turn import Turn
from streamchat.tui.widgets.turn_column import TurnColumn

MAX_TURNS = 40
"""Maximum mounted turns while the view follows the end."""
READING_MAX_TURNS = 60
"""Maximum mounted turns while the view is scrolled back."""
TAIL = 10
"""Newest turns that always stay mounted, including the current one."""
STEP = 10
"""Turns to mount at a time."""


class PlaceholderLine(Verbatim):
    """Placeholder with the number of unmounted turns; a click mounts some of them."""

    @dataclass
    class Requested(Message):
        """Mount turns at this line."""

        line: PlaceholderLine

    def set_count(self, count: int, which: str) -> None:
        """Set the number of turns; `which` is 'older' or 'newer'."""
        arrow = "▴" if which == "older" else "▾"
        self.show(f"{arrow} {plural(count, f'{which} turn')} · scroll or click to show")

    def on_click(self) -> None:
        """Request the turns."""
        self.post_message(self.Requested(self))


class MountedTurns:
    """The mounted turns of one column, and the data of all finished turns."""

    def __init__(self, view: TurnColumn) -> None:
        self._view = view
        self.turns: dict[int, Turn] = {}
        """Mounted turns by number, in ascending order."""
        self.history = TranscriptHistory()
        self.older: PlaceholderLine | None = None
        self.gap: PlaceholderLine | None = None
        self.is_mounting = False
        """Whether turns are being mounted."""

    def clear(self) -> None:
        """Reset after the conversation was cleared."""
        self.turns.clear()
        self.history.clear()
        self.older = self.gap = None

    async def skip(self, past: FinishedTurn) -> None:
        """Add a turn without mounting it; while the view follows the end, all earlier turns are unmounted."""
        self.history.add(past)
        if self._view.following and self.turns:
            await self.unmount(list(self.turns))

    async def prune(self) -> None:
        """Unmount turns if there are too many, away from the view."""
        numbers = sorted(self.turns)
        if len(numbers) <= (MAX_TURNS if self._view.following else READING_MAX_TURNS):
            await self._update_placeholders()  # earlier turns may have been skipped
            return
        excess = len(numbers) - MAX_TURNS
        last_excess = self.turns[numbers[excess - 1]]
        in_view = not self._view.following and last_excess.virtual_region.bottom > self._view.scroll_y
        await self._prune(excess, keep_oldest=in_view)

    async def _prune(self, excess: int, *, keep_oldest: bool) -> None:
        """Unmount `excess` turns: the oldest ones, or the newest ones before the tail."""
        numbers = sorted(self.turns)
        if excess > 0:
            await self.unmount(numbers[:-TAIL][-excess:] if keep_oldest else numbers[:excess])

    async def show_older(self) -> None:
        """Mount some turns before the first mounted one."""
        if self.is_mounting or not self.turns:
            return
        await self._mount(self.history.before(min(self.turns), STEP), at_top=True)

    async def show_newer(self) -> None:
        """Mount some turns of the gap before the newest ones."""
        if self.is_mounting or self.gap is None:
            return
        last, tail = self._around_gap()
        wanted = [past for past in self.history.after(last, STEP) if past.number < tail]
        await self._mount(wanted, at_top=False)

    async def show_around(self, number: int) -> None:
        """Mount the turns around an unmounted turn, instead of the current ones."""
        numbers = sorted(self.turns)
        await self.unmount(numbers[:-TAIL])
        wanted = [*self.history.before(number, STEP // 2), *self.history.after(number - 1, STEP)]
        await self._mount([past for past in wanted if past.number not in self.turns], at_top=True)

    async def show_newest(self) -> None:
        """Mount the newest turns if none are mounted."""
        if not self.turns:
            await self._mount(self.history.before(1 << 62, STEP), at_top=False)

    async def close_gap(self) -> None:
        """Close the gap: keep only the newest turns mounted."""
        if self.gap is None:
            return
        _, tail = self._around_gap()
        await self.unmount([number for number in self.turns if number < tail])
        await self._mount(self.history.before(tail, STEP), at_top=True)
        self._view.anchor()

    def _around_gap(self) -> tuple[int, int]:
        """Numbers of the last turn before the gap and the first turn after it."""
        assert self.gap is not None
        at = self._view.children.index(self.gap)
        before = [w.number for w in self._view.children[:at] if isinstance(w, Turn) and w.number]
        after = [w.number for w in self._view.children[at:] if isinstance(w, Turn) and w.number]
        return max(before, default=0), min(after, default=0)

    async def _mount(self, wanted: Sequence[FinishedTurn], *, at_top: bool) -> None:
        if not wanted:
            await self._update_placeholders()
            return
        self.is_mounting = True
        try:
            place: Widget | None = self.turns[min(self.turns)] if at_top else self.gap
            if at_top and place is not None and isinstance(self._before(place), ContextEdge):
                place = self._before(place)
            above = 0 if place is None else place.virtual_region.y - self._view.scroll_y
            with self._view.app.batch_update():
                for past in wanted:
                    turn = Turn(past.text, self._view.model, self._view.thinking)
                    await self._view.mount(turn, before=place)
                    await turn.restore(past)
                    turn.show_visibility(self._view.context_view.turn(past.number))
                    self.turns[past.number] = turn
                self.turns = dict(sorted(self.turns.items()))
                await self._update_placeholders()
                await self._view.place_edge(self.turns)
            await self._prune(len(self.turns) - READING_MAX_TURNS, keep_oldest=at_top)
            if at_top and place is not None and not self._view.following:
                self._view.call_after_refresh(self._keep_view, place, above)
        finally:
            self.is_mounting = False

    def _keep_view(self, widget: Widget, above: float) -> None:
        """Scroll so that `widget` is again `above` rows below the top of the view."""
        if widget.is_attached:
            self._view.scroll_to(y=widget.virtual_region.y - above, animate=False, immediate=True)

    def _before(self, widget: Widget) -> Widget | None:
        at = self._view.children.index(widget)
        return self._view.children[at - 1] if at else None

    async def unmount(self, numbers: Sequence[int]) -> None:
        """Unmount turns and the lines between them."""
        if not numbers:
            return
        doomed: list[Widget] = []
        leaving = {self.turns[number] for number in numbers}
        last = self.turns[max(numbers)]
        inside = False
        for child in self._view.children:
            inside = inside or child in leaving
            keep = isinstance(child, SystemPrompt | PlaceholderLine | ContextEdge) or (
                isinstance(child, Turn) and child not in leaving
            )
            if inside and not keep:
                doomed.append(child)
            if child is last:
                break
        for number in numbers:
            del self.turns[number]
        with self._view.app.batch_update():
            await self._view.remove_children(doomed)
            await self._update_placeholders()
            await self._view.place_edge(self.turns)

    async def _update_placeholders(self) -> None:
        """Update the placeholder lines."""
        numbers = sorted(self.turns)
        count = self.history.count_before(numbers[0]) if numbers else len(self.history)
        self.older = await self._line_for(self.older, count, "older", self.turns[numbers[0]] if numbers else None)
        gap = next(((a, b) for a, b in pairwise(numbers) if b > a + 1), None)
        missing = gap[1] - gap[0] - 1 if gap else 0
        self.gap = await self._line_for(self.gap, missing, "newer", self.turns[gap[1]] if gap else None)

    async def _line_for(
        self, line: PlaceholderLine | None, count: int, which: str, place: Widget | None
    ) -> PlaceholderLine | None:
        if not count or place is None:
            if line is not None:
                await line.remove()
            return None
        before: Widget = place
        above = self._before(place)
        if isinstance(above, ContextEdge):
            before = above
        if line is None:
            line = PlaceholderLine()
            await self._view.mount(line, before=before)
        elif self._view.widget_after(line) is not before:
            self._view.move_child(line, before=before)
        line.set_count(count, which)
        return line
