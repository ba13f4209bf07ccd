"""One turn: the user's message, evictions, the reply, and its figures."""

from __future__ import annotations

from dataclasses import dataclass

from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message

from streamchat.base.events import PrefillProgress, SavedTurn, TokensEvicted, TurnFinished
from streamchat.base.sanitize import one_line
from streamchat.config.settings import Thinking
from streamchat.frontend.messages import prefill_text, turn_figures
from streamchat.frontend.presenter import was_cut
from streamchat.frontend.visibility import TurnVisibility, Visibility
from streamchat.tui.bindings import hint
from streamchat.tui.transcript import FinishedTurn
from streamchat.tui.widgets.asleep import Sleeper
from streamchat.tui.widgets.backdrop import Column
from streamchat.tui.widgets.lines import EvictionLine, RecallLine
from streamchat.tui.widgets.one_layout import OneLayout
from streamchat.tui.widgets.reply import Reply
from streamchat.tui.widgets.text import Folded, Verbatim

_LABELS: dict[Visibility, str] = {
    "visible": "",
    "partial": " · partly evicted",
    "evicted": " · no longer in context",
}


class UserMessage(Vertical):
    """The user's message: a heading above the text; long text is folded."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(Verbatim("You", classes="heading"), Folded(text, lines=16, classes="body"))


class Turn(Column, OneLayout, Sleeper):
    """Grows as events of the turn arrive.

    Args:
        text: The user's message.
        model: Name of the model, for the heading of the reply.
        thinking: How reasoning is displayed.
    """

    @dataclass
    class Chosen(Message):
        """The turn was clicked."""

        turn: Turn

    def __init__(self, text: str, model: str, thinking: Thinking = "collapse") -> None:
        super().__init__()
        self.text = text
        self._thinking = thinking
        self.number = 0
        """Assigned by the engine; 0 until then."""
        self.visibility = TurnVisibility()
        self._model = model
        self._reply: Reply | None = None
        self._evictions: list[EvictionLine] = []
        self._last_eviction: EvictionLine | None = None
        self._recalls: list[str] = []

    def compose(self) -> ComposeResult:
        """The message and a status line."""
        yield UserMessage(self.text)
        yield Verbatim("sent", classes="figures")

    @property
    def reply_text(self) -> str:
        """The reply so far."""
        return self._reply.text if self._reply else ""

    @property
    def figures_text(self) -> str:
        """The line under the reply."""
        return self._figures.text

    @property
    def evictions(self) -> list[str]:
        """Sentences about the evictions during this turn, as shown."""
        return [line.sentence for line in self._evictions]

    def set_number(self, number: int) -> None:
        """Set the number after the engine accepted the message."""
        self.number = number
        self._mark_messages()
        self._figures.show("prefill")

    def show_prefill(self, event: PrefillProgress) -> None:
        """Show the progress of the prefill."""
        self._figures.show(prefill_text(event))

    async def add_eviction(self, event: TokensEvicted) -> None:
        """Show an eviction during this turn."""
        if self._last_eviction is not None:
            self._last_eviction.add(event)
            return
        # above the reply if it has not started, else below it; a line cannot be inserted into Markdown
        self._last_eviction = EvictionLine(event, after=self._reply is not None)
        await self._mount_eviction(self._last_eviction)

    async def add_recall(self, sentence: str) -> None:
        """Show that turns were recalled for this one."""
        self._recalls.append(sentence)
        await self.mount(RecallLine(sentence), before=self._figures)

    async def add(self, text: str) -> None:
        """Append text of the reply."""
        if self._reply is None:
            # later evictions belong to the reply
            self._last_eviction = None
            self._reply = Reply(self._model, self._thinking)
            await self.mount(self._reply, before=self._figures)
            self._mark_messages()
            watching = getattr(self.app, "watching", False)
            self._figures.show("generating" if watching else f"generating · {hint(self.app, 'chat.stop')} stops")
        await self._reply.add(text)

    @property
    def finished_turn(self) -> FinishedTurn:
        """The finished turn as data."""
        evictions = tuple((line.sentence, line.has_class("-after")) for line in self._evictions)
        cut = self._figures.has_class("-cut")
        raw = self._reply.raw if self._reply else ""
        return FinishedTurn(self.number, self.text, raw, self.figures_text, cut, evictions, tuple(self._recalls))

    async def restore(self, past: FinishedTurn) -> None:
        """Show the finished turn `past`; call it right after mounting."""
        self.number = past.number
        for sentence, after in past.evictions:
            if not after:
                await self._mount_eviction(EvictionLine(sentence))
        for sentence in past.recalls:
            await self.add_recall(sentence)
        if past.reply:
            self._reply = Reply(self._model, self._thinking)
            await self.mount(self._reply, before=self._figures)
            await self._reply.finish(past.reply)
        for sentence, after in past.evictions:
            if after:
                await self._mount_eviction(EvictionLine(sentence, after=True))
        self._figures.set_class(past.cut, "-cut")
        self._figures.show(past.figures)
        self._mark_messages()

    async def _mount_eviction(self, line: EvictionLine) -> None:
        self._evictions.append(line)
        await self.mount(line, before=self._figures)

    def set_status(self, why: str) -> None:
        """Show a final status: 'stopping', 'the engine failed'."""
        self._figures.show(why)

    async def finish(self, event: TurnFinished) -> None:
        """Show the finished turn."""
        if self._reply is None and event.reply:
            await self.add(event.reply)
        if self._reply is not None:
            await self._reply.finish(event.reply)
        self._last_eviction = None
        self._figures.set_class(was_cut(event.finish_reason), "-cut")
        self._figures.show(turn_figures(event))

    def show_visibility(self, visibility: TurnVisibility) -> None:
        """Fade partly or fully evicted messages, and mark a pinned or recalled turn."""
        if visibility == self.visibility:
            return
        self.visibility = visibility
        self._mark_messages()

    def on_click(self, event: events.Click) -> None:
        """Select the turn, unless the click ends a text selection."""
        if self.number and not self.screen.get_selected_text():
            self.post_message(self.Chosen(self))

    @property
    def _figures(self) -> Verbatim:
        return self.query_one(".figures", Verbatim)

    def _mark_messages(self) -> None:
        """Update headings and classes: number of the turn, whether it is pinned or recalled, what was evicted of it."""
        number = f" · {self.number}" if self.number else ""
        mark = " · ◆ pinned" if self.visibility.pinned else " · ↩ recalled" if self.visibility.recalled else ""
        for name, message, state in (
            ("You", self.query_one(UserMessage), self.visibility.user),
            (self._model, self._reply, self.visibility.reply),
        ):
            if message is None:
                continue
            message.set_class(state == "partial", "-partial")
            message.set_class(state == "evicted", "-evicted")
            if message.is_mounted:
                heading = message.query_one(".heading", Verbatim)
                heading.show(f"{one_line(name)}{number}{mark}{_LABELS[state]}")
        self.set_class(self.visibility.evicted, "-evicted")
        self.set_class(self.visibility.pinned, "-pinned")


def from_saved_turn(turn: SavedTurn) -> FinishedTurn:
    """Convert a saved turn."""
    return FinishedTurn(turn.number, turn.text, turn.reply, turn_figures(turn), was_cut(turn.finish_reason))
