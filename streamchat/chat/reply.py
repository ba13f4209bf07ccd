"""One reply as it grows: which ids it has, which text they make, and where it may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamchat.chat.detokenizer import Detokenizer
from streamchat.chat.stops import StopMatcher


@dataclass(frozen=True)
class KeptReply:
    """The part of a reply that stays."""

    tokens: int
    """Ids from the start that stay as they are."""
    rest: str
    """Text after those ids that belongs to the reply: the id that ended it held more."""


class ReplyText:
    """Turns sampled ids into text to show.

    White space at the very start is not shown; the ids keep it.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(stop_strings)
        self._passed = ""
        """Text that went to the screen, white space at the start included."""
        self._ends: list[tuple[int, bool]] = []
        """After each id: length of all text so far, and whether it ends between characters."""
        self._length = 0
        self.shown = ""

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """More text to show."""
        text = self._detokenizer.push(token)
        self._length += len(text)
        self._ends.append((self._length, self._detokenizer.complete))
        return self._show(self._stops.push(text))

    def finish(self) -> str:
        """Text that was held back as the possible beginning of a stop string. An unfinished character is left out."""
        return self._show(self._stops.flush())

    def kept(self) -> KeptReply:
        """What stays in the cache so that it says exactly what was shown. Call after `finish`."""
        length, count = len(self._passed), len(self._ends)
        while count and not (self._ends[count - 1][0] <= length and self._ends[count - 1][1]):
            count -= 1
        covered = self._ends[count - 1][0] if count else 0
        return KeptReply(count, self._passed[covered:])

    def _show(self, text: str) -> str:
        self._passed += text
        new = text if self.shown else text.lstrip()
        self.shown += new
        return new
