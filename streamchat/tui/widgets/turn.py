"""One turn: what the user said, what left the cache meanwhile, the reply, and its figures."""

from __future__ import annotations

from typing import Literal

from textual.app import ComposeResult
from textual.containers import Vertical

from streamchat.chat.events import PrefillProgress, TokensEvicted, TurnFinished
from streamchat.chat.text import one_line
from streamchat.tui.widgets.lines import EvictionLine
from streamchat.tui.widgets.reply import Reply
from streamchat.tui.widgets.text import Folded, Verbatim
from streamchat.units import human_seconds

Memory = Literal["seen", "partly", "forgotten"]
_WORDS = {"seen": "", "partly": " · partly forgotten", "forgotten": " · no longer seen by the model"}


class UserMessage(Vertical):
    """What the user said."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def compose(self) -> ComposeResult:
        """A heading over the text, long ones folded."""
        yield Verbatim("You", classes="heading")
        yield Folded(self.text, lines=16, classes="body")


class Turn(Vertical):
    """Grows as events of its turn arrive.

    Args:
        text: The user's message.
        model: Name of the model, as heading of the reply.
    """

    def __init__(self, text: str, model: str) -> None:
        super().__init__()
        self.text = text
        self.number = 0
        """Given by the engine; 0 until then."""
        self.memory: Memory = "seen"
        self._model = model
        self._reply: Reply | None = None
        self._evictions: list[EvictionLine] = []
        self._line: EvictionLine | None = None

    def compose(self) -> ComposeResult:
        """The message and a line for what happens with it."""
        yield UserMessage(self.text)
        yield Verbatim("sent", classes="figures")

    @property
    def reply_text(self) -> str:
        """The reply as far as it is shown."""
        return self._reply.text if self._reply else ""

    @property
    def figures_text(self) -> str:
        """The line under the reply."""
        return self._figures.text

    @property
    def evictions(self) -> list[TokensEvicted]:
        """What left the cache during this turn, as told."""
        return [line.event for line in self._evictions]

    def begin(self, number: int) -> None:
        """The engine accepted the message."""
        self.number = number
        self._head()
        self._figures.show("reading")

    def read(self, event: PrefillProgress) -> None:
        """A part of the message was read."""
        self._figures.show(f"reading {event.done:,} of {event.total:,} tokens")

    async def evicted(self, event: TokensEvicted) -> None:
        """Tokens left the cache while this turn was read or answered."""
        if self._line is not None:
            self._line.add(event)
            return
        self._line = EvictionLine(event, after=self._reply is not None)
        self._evictions.append(self._line)
        # above the reply while it has not begun, else below it: Markdown has no place for it in between
        await self.mount(self._line, before=self._figures)

    async def add(self, text: str) -> None:
        """More of the reply."""
        if self._reply is None:
            # evictions from now on belong to the reply
            self._line = None
            self._reply = Reply(self._model)
            await self.mount(self._reply, before=self._figures)
            self._head()
            self._figures.show("writing · Esc stops")
        await self._reply.add(text)

    def ended(self, why: str) -> None:
        """Nothing more comes, or soon: 'stopping', 'the engine failed'."""
        self._figures.show(why)

    async def finish(self, event: TurnFinished) -> None:
        """The turn is over and part of the conversation."""
        if self._reply is None and event.reply:
            await self.add(event.reply)
        if self._reply is not None:
            await self._reply.finish(event.reply)
        self._line = None
        self._figures.set_class(event.finish_reason in ("length", "cancelled"), "-cut")
        self._figures.show(turn_figures(event))

    def forget(self, memory: Memory) -> None:
        """Fade: the model sees only a part of this turn, or nothing of it."""
        self.memory = memory
        self.set_class(memory == "partly", "-partly")
        self.set_class(memory == "forgotten", "-forgotten")
        self._head()

    @property
    def _figures(self) -> Verbatim:
        return self.query_one(".figures", Verbatim)

    def _head(self) -> None:
        number = f" · {self.number}" if self.number else ""
        for name, message in (("You", self.query_one(UserMessage)), (self._model, self._reply)):
            if message is not None and message.is_mounted:
                heading = message.query_one(".heading", Verbatim)
                heading.show(f"{one_line(name)}{number}{_WORDS[self.memory]}")


def turn_figures(event: TurnFinished) -> str:
    """Tokens, speed and time to first token, and why the reply ended where that is not its own end."""
    stats = event.stats
    parts = []
    if event.finish_reason == "cancelled":
        parts.append("stopped")
    elif event.finish_reason == "length":
        parts.append(f"stopped at the limit of {stats.new_tokens:,} tokens (/set max_new_tokens)")
    elif not event.reply:
        parts.append("the model ended its turn without a word")
    parts.append(f"{stats.new_tokens:,} token{'s' if stats.new_tokens != 1 else ''}")
    if stats.decode_tps is not None:
        parts.append(f"{stats.decode_tps:.1f} tok/s")
    if stats.ttft_s is not None:
        parts.append(f"first token {human_seconds(stats.ttft_s)}")
    return " · ".join(parts)
