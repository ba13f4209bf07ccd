"""The conversation: turns and lines, followed at the end while the reader is there, pruned at the top."""

from __future__ import annotations

from textual.containers import VerticalScroll
from textual.widget import Widget

from streamchat.chat.events import TokensEvicted
from streamchat.tui.widgets.lines import EvictionLine, Line, SystemPrompt
from streamchat.tui.widgets.text import Verbatim
from streamchat.tui.widgets.turn import Turn

MAX_TURNS = 200
"""Older turns are taken off the screen."""
HARD_MAX_TURNS = 260
"""Also while the reader looks at them: then the view moves once."""
MAX_OTHERS = 200
"""Lines and command outputs between turns."""


class PrunedLine(Verbatim):
    """Says how many turns are not shown any more."""


class Conversation(VerticalScroll, can_focus=False):
    """Turns by number, and everything between them in order."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's word
        super().__init__(id=id)
        self.model = "assistant"
        """Name over the replies."""
        self._turns: dict[int, Turn] = {}
        self._pruned = 0
        self._loose: EvictionLine | None = None

    def on_mount(self) -> None:
        """Follow the end until the reader scrolls away."""
        self.anchor()

    # --- reading --------------------------------------------------------------------------------------------

    @property
    def following(self) -> bool:
        """New text scrolls into view by itself."""
        return self.is_anchored and not self._anchor_released

    def follow(self) -> None:
        """Go to the end and stay there."""
        self.anchor()

    def turn(self, number: int) -> Turn | None:
        """The turn of that number, if it is on the screen."""
        return self._turns.get(number)

    @property
    def turns(self) -> list[Turn]:
        """All turns on the screen, in order."""
        return list(self.query_children(Turn).results(Turn))

    @property
    def last_reply(self) -> str:
        """Text of the newest reply; '' before the first."""
        return next((turn.reply_text for turn in reversed(self.turns) if turn.reply_text), "")

    # --- writing --------------------------------------------------------------------------------------------

    async def add(self, widget: Widget) -> None:
        """Append something that is no turn."""
        self._loose = None
        await self.mount(widget)
        if len(self.children) - len(self._turns) > MAX_OTHERS:
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
        turn = Turn(text, self.model)
        await self.mount(turn)
        self.follow()
        return turn

    def number_turn(self, turn: Turn, number: int) -> None:
        """The engine accepted `turn`."""
        self._turns[number] = turn
        turn.begin(number)

    async def remove_turn(self, turn: Turn) -> None:
        """The turn was rolled back. What it pushed out of the cache stays out, and stays told."""
        for event in turn.evictions:
            await self.add(EvictionLine(event))
        self._turns.pop(turn.number, None)
        await turn.remove()

    async def evicted(self, event: TokensEvicted, current: Turn | None) -> None:
        """Tokens left the cache: say so in `current`, and fade the turns that lost them."""
        for number in event.turns:
            turn = self._turns.get(number)
            if turn is not None and turn.memory != "forgotten":
                turn.forget("forgotten" if number in event.turns_gone else "partly")
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
        self._turns.clear()
        self._pruned, self._loose = 0, None
        await self.remove_children()
        await self.show_system_prompt(system_prompt)
        self.follow()

    async def prune(self) -> None:
        """Take the oldest turns off the screen where there are too many, and say so."""
        count = len(self._turns)
        if count <= (MAX_TURNS if self.following else HARD_MAX_TURNS):
            return
        oldest = sorted(self._turns)[: count - MAX_TURNS]
        last = self._turns[oldest[-1]]
        doomed = []
        for child in self.children:
            if not isinstance(child, SystemPrompt | PrunedLine):
                doomed.append(child)
            if child is last:
                break
        for number in oldest:
            del self._turns[number]
        self._pruned += len(oldest)
        with self.app.batch_update():
            await self.remove_children(doomed)
            await self._say_pruned()

    async def _say_pruned(self) -> None:
        many = self._pruned != 1
        text = f"{self._pruned:,} older turn{'s are' if many else ' is'} not shown here any more"
        for line in self.query_children(PrunedLine).results(PrunedLine):
            line.show(text)
            return
        top = 1 if self.query_children(SystemPrompt) else 0
        await self.mount(PrunedLine(text), before=top if len(self.children) > top else None)

    async def _prune_others(self) -> None:
        others = [child for child in self.children if not isinstance(child, Turn | SystemPrompt | PrunedLine)]
        await self.remove_children(others[: len(others) - MAX_OTHERS])
