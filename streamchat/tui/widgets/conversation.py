"""The conversation: turns and lines, followed at the end while the reader is there, few of them mounted at a time."""

from __future__ import annotations

from collections.abc import Iterable

from textual.message import Message
from textual.widget import Widget

from streamchat.base.events import CacheState, TokensEvicted
from streamchat.frontend.visibility import Visible
from streamchat.tui.past import PastTurn
from streamchat.tui.widgets.edge import MemoryEdge
from streamchat.tui.widgets.lines import EvictionLine, Line, SystemPrompt
from streamchat.tui.widgets.stretch import ElsewhereLine, Stretch
from streamchat.tui.widgets.turn import Turn
from streamchat.tui.widgets.turn_column import TurnColumn

MAX_OTHERS = 200
"""Lines and command outputs between turns."""


class Conversation(TurnColumn, can_focus=False):
    """Turns by number, and everything between them in order.

    Of thousands of turns a few are mounted at a time: `Stretch` decides which.
    """

    class Scrolled(Message):
        """The reader went away from the end, or came back."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's word
        super().__init__(id=id)
        self.stretch = Stretch(self)
        self._cache = CacheState()
        self._loose: EvictionLine | None = None

    def on_mount(self) -> None:
        """Follow the end until the reader scrolls away."""
        self.anchor()

    # --- reading --------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Go to the end and stay there."""
        self.anchor()
        self.post_message(self.Scrolled())
        if self.stretch.gap is not None:
            self.call_later(self.stretch.leave_the_past)

    def turn(self, number: int) -> Turn | None:
        """The turn of that number, if it is mounted."""
        return self.stretch.turns.get(number)

    @property
    def turns(self) -> list[Turn]:
        """All mounted turns, in order."""
        return list(self.query_children(Turn).results(Turn))

    @property
    def last_reply(self) -> str:
        """Text of the newest reply; '' before the first."""
        return next((turn.reply_text for turn in reversed(self.turns) if turn.reply_text), "")

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Bring turns back when the reader comes to a place where some are missing."""
        super().watch_scroll_y(old_value, new_value)
        self.post_message(self.Scrolled())
        if self.following or self.stretch.moving:
            return
        if new_value <= 0 and self.stretch.older is not None:
            self.call_later(self.stretch.show_older)
        elif self.stretch.gap is not None and new_value > old_value and self._in_view(self.stretch.gap):
            self.call_later(self.stretch.show_newer)

    def _in_view(self, widget: Widget) -> bool:
        return self.scroll_y <= widget.virtual_region.y < self.scroll_y + self.size.height

    async def go_to(self, number: int) -> Turn | None:
        """Bring turn `number` into view, mounted again where it is not; None where there is none."""
        if number not in self.stretch.turns and self.stretch.past.before(number + 1, 1):
            await self.stretch.show_around(number)
        turn = self.stretch.turns.get(number)
        if turn is not None:
            self.release_anchor()
            self.call_after_refresh(turn.scroll_visible, animate=False, top=True, force=True)
        return turn

    # --- writing --------------------------------------------------------------------------------------------

    async def add(self, widget: Widget) -> None:
        """Append something that is no turn."""
        self._loose = None
        await self.mount(widget)
        if len(self.children) - len(self.stretch.turns) > MAX_OTHERS:
            await self._prune_others()

    async def say(self, text: str, level: str = "info") -> None:
        """Append a line of the program."""
        await self.add(Line(text, level))

    async def show_system_prompt(self, text: str) -> None:
        """Put the system prompt at the top; '' takes it away."""
        for block in self.query_children(SystemPrompt):
            await block.remove()
        if text:
            await self.mount(SystemPrompt(text), before=0)

    async def add_turn(self, text: str) -> Turn:
        """Append what the user just sent; the engine gives it a number later."""
        self._loose = None
        turn = Turn(text, self.model, self.thinking)
        await self.mount(turn)
        self.follow()
        return turn

    def number_turn(self, turn: Turn, number: int) -> None:
        """The engine accepted `turn`."""
        self.stretch.turns[number] = turn
        turn.begin(number)

    async def finish_turn(self, turn: Turn) -> None:
        """The turn is over and stays."""
        self.stretch.past.add(turn.past)
        await self.stretch.prune()

    async def skip(self, past: PastTurn) -> None:
        """A turn came and went without having been drawn."""
        await self.stretch.skip(past)

    async def remove_turn(self, turn: Turn) -> None:
        """The turn was rolled back: what it pushed out of the cache is seen again."""
        self.stretch.turns.pop(turn.number, None)
        await turn.remove()

    async def undo_turn(self, number: int) -> None:
        """Turn `number`, the newest, was taken back."""
        self.stretch.past.remove(number)
        turn = self.turn(number)
        if turn is not None:
            await self.remove_turn(turn)
        if not self.stretch.turns and len(self.stretch.past):
            await self.stretch.show_newest()

    async def resume(self, turns: Iterable[PastTurn], system_prompt: str) -> None:
        """Another conversation takes the place of this one."""
        await self.start_over(system_prompt)
        for turn in turns:
            self.stretch.past.add(turn)
        await self.stretch.show_newest()
        self.follow()

    async def evicted(self, event: TokensEvicted, current: Turn | None) -> None:
        """Tokens left the cache: say so in `current`, or by itself."""
        if current is not None:
            await current.evicted(event)
        elif self._loose is not None:
            self._loose.add(event)
        else:
            line = EvictionLine(event)
            await self.add(line)
            self._loose = line

    async def start_over(self, system_prompt: str) -> None:
        """Empty, but for the system prompt."""
        self.stretch.clear()
        self._edge = self._loose = None
        self._cache = CacheState()
        self.sight = Visible(self._cache)
        await self.remove_children()
        await self.show_system_prompt(system_prompt)
        self.follow()

    # --- what the model sees --------------------------------------------------------------------------------

    async def show_memory(self, cache: CacheState) -> None:
        """Fade messages by what the cache holds of them, and move the edge of memory."""
        if cache is self._cache:
            return
        self._cache, self.sight = cache, Visible(cache)
        for number, turn in self.stretch.turns.items():
            turn.show_memory(self.sight.turn(number))
        await self.place_edge(self.stretch.turns)

    async def on_elsewhere_line_wanted(self, message: ElsewhereLine.Wanted) -> None:
        """A click on such a line."""
        message.stop()
        if message.line is self.stretch.older:
            self.release_anchor()
            await self.stretch.show_older()
        else:
            await self.stretch.show_newer()

    async def _prune_others(self) -> None:
        others = [
            child for child in self.children if not isinstance(child, Turn | SystemPrompt | ElsewhereLine | MemoryEdge)
        ]
        await self.remove_children(others[: len(others) - MAX_OTHERS])
