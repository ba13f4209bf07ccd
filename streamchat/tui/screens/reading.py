"""Read-only part of the chat screen: scrolling, copying, the status panel, and the context map."""

from __future__ import annotations

from textual import events, on
from textual.screen import Screen

from streamchat.base.sanitize import one_line
from streamchat.tui.clipboard import SENT, last_code
from streamchat.tui.screens.latest_size import LatestSize
from streamchat.tui.widgets.context_map import ContextMap
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.section import Section
from streamchat.tui.widgets.thinking import Thinking
from streamchat.tui.widgets.turn import Turn

WIDE = 100
"""Minimum columns to show the panel by default."""
MIN_WIDTH = 60
"""Minimum columns to show the panel at all."""


class ReadingScreen(LatestSize, Screen[None]):
    """A screen with a `Conversation` and a `StatusPanel`."""

    def __init__(self) -> None:
        super().__init__()
        self.conversation = Conversation(id="conversation")
        self._sidebar_wanted: bool | None = None
        """The user's choice; None = depends on the width."""
        self._map_open = False
        """Whether the context map needs the panel, which may be hidden otherwise."""

    # --- selection, shared by the context map and the conversation ----------------------------------------------

    @on(ContextMap.TurnRequested)
    async def _open_turn(self, message: ContextMap.TurnRequested) -> None:
        message.stop()
        turn = await self.conversation.go_to(message.turn)
        if turn is not None:
            self._mark(turn)

    @on(Turn.Chosen)
    def _turn_chosen(self, message: Turn.Chosen) -> None:
        message.stop()
        self._mark(message.turn)
        self.query_one(ContextMap).choose_turn(message.turn.number)

    def _mark(self, turn: Turn | None) -> None:
        """Highlight one turn, or none."""
        for other in self.query(Turn):
            other.set_class(other is turn, "-chosen")

    def action_focus_map(self) -> None:
        """Focus the context map, showing the panel if necessary."""
        if self._has_room():
            self._map_open = True
            self._arrange(self.size.width)
            self.query_one("#section-cache", Section).fold(False)
            self.query_one(ContextMap).focus()

    def leave_map(self) -> None:
        """Hide the panel again if it was shown only for the context map."""
        self._map_open = False
        self._arrange(self.size.width)

    async def action_step_turn(self, by: int) -> None:
        """Go to the turn before (-1) or after (1) the highlighted one, or to the newest."""
        numbers = [turn.number for turn in self.conversation.turns if turn.number]
        chosen = next((turn.number for turn in self.query(Turn) if turn.has_class("-chosen")), None)
        wanted = (numbers[-1] if numbers else 0) if chosen is None else chosen + by
        turn = await self.conversation.go_to(wanted) if wanted >= 1 else None
        if turn is None:
            self._mark(None)
            self.conversation.follow()
            self.query_one(ContextMap).choose_turn(0)
        else:
            self._mark(turn)
            self.query_one(ContextMap).choose_turn(wanted)

    # --- copying --------------------------------------------------------------------------------------------

    def action_copy_reply(self) -> None:
        """Copy the last reply."""
        self.toast(self.copy_reply(code_only=False), "information")

    def action_copy_code(self) -> None:
        """Copy the last code block."""
        self.toast(self.copy_reply(code_only=True), "information")

    def copy_reply(self, code_only: bool) -> str:
        """Copy the last reply, or its last code block; returns a message."""
        text = self.conversation.last_reply
        if not text:
            return "no reply to copy yet"
        if code_only:
            text = last_code(text)
            if not text:
                return "the last reply has no code block"
        self.app.copy_to_clipboard(text)
        return f"{'code' if code_only else 'reply'} {SENT}"

    # --- the panel ------------------------------------------------------------------------------------------

    def action_toggle_sidebar(self) -> None:
        """Switch between the sidebar and the status line."""
        if self._has_room():
            self._sidebar_wanted, self._map_open = not self.has_class("-sidebar"), False
            self._arrange(self.size.width)

    def _has_room(self) -> bool:
        """Whether the terminal is wide enough for the panel; if not, a toast says so."""
        if self.size.width < MIN_WIDTH:
            self.toast(f"the status panel needs a terminal with at least {MIN_WIDTH} columns", "warning")
        return self.size.width >= MIN_WIDTH

    def on_resize(self, event: events.Resize) -> None:
        """Show the sidebar or the status line, depending on the width."""
        self._arrange(event.size.width)

    def _arrange(self, width: int) -> None:
        wanted = width >= WIDE if self._sidebar_wanted is None else self._sidebar_wanted
        self.set_class((wanted or self._map_open) and width >= MIN_WIDTH, "-sidebar")
        context_map = self.query_one(ContextMap)
        if context_map.has_focus and not self.has_class("-sidebar"):
            context_map.action_leave()

    # --- scrolling and folding ------------------------------------------------------------------------------

    def action_toggle_thoughts(self) -> None:
        """Unfold all reasoning in the conversation, or fold it if some is unfolded."""
        blocks = list(self.query(Thinking))
        unfolded = any(block.unfolded for block in blocks)
        for block in blocks:
            block.fold(unfolded)
        if not blocks:
            self.toast("no reasoning in the visible replies", "information")

    def action_follow(self) -> None:
        """Jump to the end and follow new text."""
        self.conversation.follow()

    def action_scroll_top(self) -> None:
        """Jump to the top."""
        self.conversation.scroll_home(animate=False)

    def action_scroll_page(self, direction: int) -> None:
        """Scroll a page up (-1) or down (1)."""
        step = max(1, self.conversation.size.height - 2)
        self.conversation.scroll_relative(y=direction * step, animate=False)

    def action_scroll_line(self, direction: int) -> None:
        """Scroll a line up (-1) or down (1)."""
        self.conversation.scroll_relative(y=direction, animate=False)

    def toast(self, text: str, level: str) -> None:
        severity = level if level in ("warning", "error") else "information"
        self.app.notify(one_line(text), severity=severity, markup=False)  # type: ignore[arg-type]
