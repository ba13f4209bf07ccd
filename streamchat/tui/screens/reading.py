"""Reading, without changing anything: scrolling, copying, the panel, and the memory map that points at messages."""

from __future__ import annotations

from textual import events, on
from textual.screen import Screen

from streamchat.base.sanitize import one_line
from streamchat.tui.clipboard import SENT, last_code
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.memory_map import MemoryMap
from streamchat.tui.widgets.section import Section
from streamchat.tui.widgets.status_panel import StatusPanel
from streamchat.tui.widgets.thinking import Thinking
from streamchat.tui.widgets.turn import Turn

WIDE = 100
"""Columns from which on the panel is shown unless the user hides it."""
ROOM = 60
"""Columns without which there is no room for the panel at all."""


class ReadingScreen(Screen[None]):
    """A screen with a `Conversation` and a `StatusPanel`."""

    def __init__(self) -> None:
        super().__init__()
        self._sidebar_wanted: bool | None = None
        """What the user asked for; None follows the width."""

    @property
    def conversation(self) -> Conversation:
        """The left side."""
        return self.query_one(Conversation)

    # --- the memory map and the conversation point at each other ---------------------------------------------

    @on(MemoryMap.Opened)
    async def _open_turn(self, message: MemoryMap.Opened) -> None:
        message.stop()
        turn = await self.conversation.go_to(message.turn)
        if turn is not None:
            self._mark(turn)

    @on(Turn.Chosen)
    def _turn_chosen(self, message: Turn.Chosen) -> None:
        message.stop()
        self._mark(message.turn)
        self.query_one(MemoryMap).choose_turn(message.turn.number)

    def _mark(self, turn: Turn | None) -> None:
        """Let one turn stand out."""
        for other in self.query(Turn):
            other.set_class(other is turn, "-chosen")

    def action_focus_map(self) -> None:
        """Choose a message by what the cache holds."""
        if not self.has_class("-sidebar"):
            self.action_toggle_sidebar()
        if self.has_class("-sidebar"):
            self.query_one("#section-cache", Section).fold(False)
            self.query_one(MemoryMap).focus()

    async def action_step_turn(self, by: int) -> None:
        """Go to the turn before (-1) or after (1) the one that stands out, or the newest."""
        numbers = [turn.number for turn in self.conversation.turns if turn.number]
        chosen = next((turn.number for turn in self.query(Turn) if turn.has_class("-chosen")), None)
        wanted = (numbers[-1] if numbers else 0) if chosen is None else chosen + by
        turn = await self.conversation.go_to(wanted) if wanted >= 1 else None
        if turn is None:
            self._mark(None)
            self.conversation.follow()
            self.query_one(MemoryMap).choose_turn(0)
        else:
            self._mark(turn)
            self.query_one(MemoryMap).choose_turn(wanted)

    # --- copying --------------------------------------------------------------------------------------------

    def action_copy_reply(self) -> None:
        """Copy the last reply."""
        self._toast(self.copy_reply(code_only=False), "information")

    def action_copy_code(self) -> None:
        """Copy the last code block."""
        self._toast(self.copy_reply(code_only=True), "information")

    def copy_reply(self, code_only: bool) -> str:
        """Copy the last reply, or its last code block; returns what to tell."""
        text = self.conversation.last_reply
        if not text:
            return "there is no reply to copy yet"
        if code_only:
            text = last_code(text)
            if not text:
                return "the last reply has no code block"
        self.app.copy_to_clipboard(text)
        return f"{'code' if code_only else 'reply'} {SENT}"

    # --- the panel ------------------------------------------------------------------------------------------

    def panel_sections(self) -> list[Section]:
        """Of the status panel."""
        return self.query_one(StatusPanel).sections

    def action_toggle_sidebar(self) -> None:
        """Show the sidebar, or the status line in its place."""
        if self.size.width < ROOM:
            self._toast(f"the status panel needs a terminal of {ROOM} columns", "warning")
            return
        self._sidebar_wanted = not self.has_class("-sidebar")
        self._arrange(self.size.width)

    def on_resize(self, event: events.Resize) -> None:
        """Sidebar or status line, by width."""
        self._arrange(event.size.width)

    def _arrange(self, width: int) -> None:
        wanted = self._sidebar_wanted
        self.set_class(width >= WIDE if wanted is None else wanted and width >= ROOM, "-sidebar")

    # --- scrolling and folding ------------------------------------------------------------------------------

    def action_toggle_thoughts(self) -> None:
        """Open all reasoning that is on the screen, or fold it where some is open."""
        blocks = list(self.query(Thinking))
        unfolded = any(block.unfolded for block in blocks)
        for block in blocks:
            block.fold(unfolded)
        if not blocks:
            self._toast("no reply here has shown its reasoning", "information")

    def action_follow(self) -> None:
        """Go to the end and follow."""
        self.conversation.follow()

    def action_scroll_top(self) -> None:
        """Go to the oldest text."""
        self.conversation.scroll_home(animate=False)

    def action_scroll_page(self, direction: int) -> None:
        """A page up (-1) or down (1)."""
        step = max(1, self.conversation.size.height - 2)
        self.conversation.scroll_relative(y=direction * step, animate=False)

    def action_scroll_line(self, direction: int) -> None:
        """A line up (-1) or down (1)."""
        self.conversation.scroll_relative(y=direction, animate=False)

    def _toast(self, text: str, level: str) -> None:
        severity = level if level in ("warning", "error") else "information"
        self.app.notify(one_line(text), severity=severity, markup=False)  # type: ignore[arg-type]
