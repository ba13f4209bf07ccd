"""One reply as it grows: which ids it has, which text they make, and where it may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamchat.conversation.detokenizer import Detokenizer
from streamchat.conversation.reasoning import ReasoningFormat, ReplyReader
from streamchat.conversation.stops import StopMatcher


@dataclass(frozen=True)
class KeptReply:
    """The part of a reply that stays."""

    tokens: int
    """Ids from the start that stay as they are."""
    rest: str
    """Text after those ids that belongs to the reply: the id that ended it held more."""


class ReplyText:
    """Turns sampled ids into text to show, with `<think>` tags around the reasoning.

    White space at the very start is not shown; the ids keep it.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...], reasoning: ReasoningFormat) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(stop_strings)
        self._silent = reasoning.silent
        self._reader = None if reasoning.plain else ReplyReader(reasoning)
        self._passed = ""
        """Text of the model that no stop string took, white space at the start included."""
        self._ends: list[tuple[int, bool]] = []
        """After each id: length of all text so far, and whether it ends between characters."""
        self._length = 0
        self.shown = ""

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._stops.stopped

    @property
    def written(self) -> str:
        """The model's own text up to a stop string, with white space at the start and its own tags."""
        return self._passed

    def push(self, token: int) -> str:
        """More text to show."""
        mark = token in self._silent if self._reader is None else self._reader.is_mark(token)
        text = "" if mark else self._detokenizer.push(token)
        self._length += len(text)
        self._ends.append((self._length, self._detokenizer.complete))
        if not mark:
            return self._pass(self._stops.push(text))
        return self._show(self._reader.mark(token)) if self._reader is not None else ""

    def finish(self) -> str:
        """Text that was held back as the possible beginning of a stop string. An unfinished character is left out."""
        more = self._pass(self._stops.flush())
        return more + self._show(self._reader.end()) if self._reader is not None else more

    def cut(self, tokens: int) -> None:
        """Only the first `tokens` ids belong to the reply; those after them have shown nothing. Call after `finish`."""
        if tokens < len(self._ends):
            self._passed = self._passed[: self._ends[tokens - 1][0] if tokens else 0]
            del self._ends[tokens:]

    def kept(self) -> KeptReply:
        """What stays in the cache so that it says exactly what was shown. Call after `finish`."""
        length, count = len(self._passed), len(self._ends)
        while count and not (self._ends[count - 1][0] <= length and self._ends[count - 1][1]):
            count -= 1
        covered = self._ends[count - 1][0] if count else 0
        return KeptReply(count, self._passed[covered:])

    def _pass(self, text: str) -> str:
        self._passed += text
        return self._show(text if self._reader is None else self._reader.text(text))

    def _show(self, text: str) -> str:
        new = text if self.shown else text.lstrip()
        self.shown += new
        return new
