"""The conversation view: turns and lines. Follows new text at the end; only a few turns are mounted."""

from __future__ import annotations

from collections.abc import Iterable

from textual.message import Message
from textual.widget import Widget

from streamchat.base.events import CacheState, TokensEvicted
from streamchat.frontend.visibility import ContextView
from streamchat.tui.transcript import FinishedTurn
from streamchat.tui.widgets.edge import ContextEdge
from streamchat.tui.widgets.lines import EvictionLine, Line, SystemPrompt
from streamchat.tui.widgets.mounted_turns import MountedTurns, PlaceholderLine
from streamchat.tui.widgets.turn import Turn
from streamchat.tui.widgets.turn_column import TurnColumn

MAX_OTHERS = 200
"""Maximum lines and command outputs between turns."""


class Conversation(TurnColumn, can_focus=False):
    """Turns by number, with lines and command outputs between them.

    `MountedTurns` keeps only some of thousands of turns mounted.
    """

    class Scrolled(Message):
        """The view was scrolled away from the end, or back to it."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's word
        super().__init__(id=id)
        self.mounted = MountedTurns(self)
        self._cache = CacheState()
        self._last_eviction: EvictionLine | None = None

    def on_mount(self) -> None:
        """Follow the end until the user scrolls away."""
        self.anchor()

    # --- reading --------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Jump to the end and follow new text."""
        self.anchor()
        self.post_message(self.Scrolled())
        if self.mounted.gap is not None:
            self.call_later(self.mounted.close_gap)

    @property
    def turns(self) -> list[Turn]:
        """All mounted turns, in order."""
        return list(self.query_children(Turn).results(Turn))

    @property
    def last_reply(self) -> str:
        """Text of the newest reply; '' if there is none."""
        return next((turn.reply_text for turn in reversed(self.turns) if turn.reply_text), "")

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Mount more turns when the user scrolls to unmounted ones."""
        super().watch_scroll_y(old_value, new_value)
        self.post_message(self.Scrolled())
        if self.following or self.mounted.is_mounting:
            return
        if new_value <= 0 and self.mounted.older is not None:
            self.call_later(self.mounted.show_older)
        elif self.mounted.gap is not None and new_value > old_value and self._in_view(self.mounted.gap):
            self.call_later(self.mounted.show_newer)

    def _in_view(self, widget: Widget) -> bool:
        return self.scroll_y <= widget.virtual_region.y < self.scroll_y + self.size.height

    async def go_to(self, number: int) -> Turn | None:
        """Scroll to turn `number`, mounting it if necessary; None if it does not exist."""
        if number not in self.mounted.turns and self.mounted.history.before(number + 1, 1):
            await self.mounted.show_around(number)
        turn = self.mounted.turns.get(number)
        if turn is not None:
            self.release_anchor()
            self.call_after_refresh(self._show_at_top, turn, again=True)
        return turn

    def _show_at_top(self, turn: Turn, again: bool) -> None:
        """Scroll `turn` to the top; once more after the next layout if turns near it may have got another height."""
        turn.scroll_visible(animate=False, top=True, force=True)
        if again:
            self.call_after_refresh(self._show_at_top, turn, again=False)

    # --- writing --------------------------------------------------------------------------------------------

    async def add(self, widget: Widget) -> None:
        """Append a widget that is not a turn."""
        self._last_eviction = None
        await self.mount(widget)
        if len(self.children) - len(self.mounted.turns) > MAX_OTHERS:
            await self._prune_others()

    async def add_notice(self, text: str, level: str = "info") -> None:
        """Append a notice."""
        await self.add(Line(text, level))

    async def show_system_prompt(self, text: str) -> None:
        """Show the system prompt at the top; '' removes it."""
        for block in self.query_children(SystemPrompt):
            await block.remove()
        if text:
            await self.mount(SystemPrompt(text), before=0)

    async def add_turn(self, text: str) -> Turn:
        """Append a turn for the user's message; the engine assigns its number later."""
        self._last_eviction = None
        turn = Turn(text, self.model, self.thinking)
        await self.mount(turn)
        self.follow()
        return turn

    def number_turn(self, turn: Turn, number: int) -> None:
        """Set the number of `turn` after the engine accepted it."""
        self.mounted.turns[number] = turn
        turn.set_number(number)

    async def finish_turn(self, turn: Turn) -> None:
        """Add a finished turn to the history."""
        self.mounted.history.add(turn.finished_turn)
        await self.mounted.prune()

    async def skip(self, past: FinishedTurn) -> None:
        """Add a finished turn that was never rendered."""
        await self.mounted.skip(past)

    async def remove_turn(self, turn: Turn) -> None:
        """Remove a turn that was rolled back."""
        self.mounted.turns.pop(turn.number, None)
        await turn.remove()

    async def undo_turn(self, number: int) -> None:
        """Remove turn `number`, the newest, after an undo."""
        self.mounted.history.remove(number)
        turn = self.mounted.turns.get(number)
        if turn is not None:
            await self.remove_turn(turn)
        if not self.mounted.turns and len(self.mounted.history):
            await self.mounted.show_newest()

    async def resume(self, turns: Iterable[FinishedTurn], system_prompt: str) -> None:
        """Replace the conversation by a resumed session."""
        await self.start_over(system_prompt)
        for turn in turns:
            self.mounted.history.add(turn)
        await self.mounted.show_newest()
        self.follow()

    async def add_eviction(self, event: TokensEvicted, current: Turn | None) -> None:
        """Report an eviction in the turn `current`, or on a separate line."""
        if current is not None:
            await current.add_eviction(event)
        elif self._last_eviction is not None:
            self._last_eviction.add(event)
        else:
            line = EvictionLine(event)
            await self.add(line)
            self._last_eviction = line

    async def start_over(self, system_prompt: str) -> None:
        """Remove everything except the system prompt."""
        self.mounted.clear()
        self._edge = self._last_eviction = None
        self._cache = CacheState()
        self.context_view = ContextView(self._cache)
        await self.remove_children()
        await self.show_system_prompt(system_prompt)
        self.follow()

    # --- visibility -----------------------------------------------------------------------------------------

    async def show_visibility(self, cache: CacheState) -> None:
        """Fade evicted messages and move the context edge."""
        if cache is self._cache:
            return
        self._cache, self.context_view = cache, ContextView(cache)
        for number, turn in self.mounted.turns.items():
            turn.show_visibility(self.context_view.turn(number))
        await self.place_edge(self.mounted.turns)

    async def on_placeholder_line_requested(self, message: PlaceholderLine.Requested) -> None:
        """Mount turns after a click on a placeholder line."""
        message.stop()
        if message.line is self.mounted.older:
            self.release_anchor()
            await self.mounted.show_older()
        else:
            await self.mounted.show_newer()

    async def _prune_others(self) -> None:
        others = [
            child
            for child in self.children
            if not isinstance(child, Turn | SystemPrompt | PlaceholderLine | ContextEdge)
        ]
        await self.remove_children(others[: len(others) - MAX_OTHERS])
