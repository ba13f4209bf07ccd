"""A reply in progress: its ids, their text, and where it can be cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from streamchat.conversation.detokenizer import Detokenizer
from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.ends import Ends, EndWatch, find_ends
from streamchat.conversation.reasoning import ReasoningFormat, ReplyReader, learn_reasoning
from streamchat.conversation.stops import StopMatcher
from streamchat.conversation.template.chat_format import ChatFormat
from streamchat.conversation.template.reply_shape import learn_shape


@dataclass(frozen=True)
class ReplyFormat:
    """What ends the replies of a model, and how it marks reasoning."""

    ends: Ends
    reasoning: ReasoningFormat


def learn_reply_format(model: Any, tokenizer: Any, encoder: ChatEncoder) -> ReplyFormat:
    """Return the format of the replies of `model`, learned from its chat template."""
    shape = learn_shape(tokenizer, encoder)
    return ReplyFormat(find_ends(model, tokenizer, shape), learn_reasoning(tokenizer, shape))


@dataclass(frozen=True)
class PreparedFormat:
    """A format of turns, and what was learned about it. Conversations on one model may share it."""

    encoder: ChatEncoder
    reply_format: ReplyFormat


def prepare_format(model: Any, tokenizer: Any, chat_format: ChatFormat) -> PreparedFormat:
    """Return `chat_format` ready for conversations on `model`."""
    encoder = ChatEncoder(tokenizer, chat_format)
    return PreparedFormat(encoder, learn_reply_format(model, tokenizer, encoder))


@dataclass(frozen=True)
class KeptReply:
    """The part of a reply that stays in the cache."""

    tokens: int
    """Number of ids, from the start, that stay."""
    rest: str
    """Text after those ids that belongs to the reply; its last id also had text that does not."""


class ReplyText:
    """Converts sampled ids to text to show, with `<think>` tags around the reasoning, and finds the end of the reply.

    White space at the start is not shown, but stays in the ids.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...], reply_format: ReplyFormat) -> None:
        reasoning = reply_format.reasoning
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(stop_strings)
        self._watch = EndWatch(reply_format.ends, tokenizer)
        self._silent = reasoning.silent
        self._reader = None if reasoning.plain else ReplyReader(reasoning)
        self.written = ""
        """The model's text up to a stop string, with its own tags and white space at the start."""
        self._ends: list[tuple[int, bool]] = []
        """For each id: length of the text so far, and whether it ends between characters."""
        self._length = 0
        self.shown = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.stopped

    def ended_by(self, token: int) -> bool:
        """Return whether `token` ends the reply; it is then not part of it. Call before `push`."""
        return self._watch.ended_by(token)

    def push(self, token: int) -> str:
        """Add an id; return more text to show."""
        mark = token in self._silent if self._reader is None else self._reader.is_mark(token)
        text = "" if mark else self._detokenizer.push(token)
        self._length += len(text)
        self._ends.append((self._length, self._detokenizer.complete))
        if not mark:
            return self._pass(self._stops.push(text))
        return self._show(self._reader.mark(token)) if self._reader is not None else ""

    def finish(self) -> str:
        """End the reply; return the text held back as a possible start of a stop string.

        An unfinished character is dropped, and so are ids at the end that belong to no message and have shown no text.
        """
        more = self._pass(self._stops.flush())
        if self._reader is not None:
            more += self._show(self._reader.end())
        tokens = self._watch.length
        if tokens < len(self._ends):
            self.written = self.written[: self._ends[tokens - 1][0] if tokens else 0]
            del self._ends[tokens:]
        return more

    def read(self, ids: Iterable[int]) -> ReplyText:
        """Add the ids of a whole reply, and end it; return the object itself."""
        for token in ids:
            self.ended_by(token)
            self.push(token)
        self.finish()
        return self

    def kept(self) -> KeptReply:
        """Return the part that stays in the cache, so that it matches the text that was shown. Call after `finish`."""
        length, count = len(self.written), len(self._ends)
        while count and not (self._ends[count - 1][0] <= length and self._ends[count - 1][1]):
            count -= 1
        covered = self._ends[count - 1][0] if count else 0
        return KeptReply(count, self.written[covered:])

    def _pass(self, text: str) -> str:
        self.written += text
        return self._show(text if self._reader is None else self._reader.text(text))

    def _show(self, text: str) -> str:
        new = text if self.shown else text.lstrip()
        self.shown += new
        return new
