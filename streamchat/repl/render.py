"""From events to what is written: reply text as it comes, and lines about it. Writes nothing itself.

A line never lands inside a streamed reply: what happens there (evictions, notices) is held until the reply is over,
evictions merged into one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from streamchat.chat import events as ev
from streamchat.chat.evictions import eviction_sentence, merged
from streamchat.chat.status import retained_words
from streamchat.chat.text import PrintableStream, printable
from streamchat.chat.thinking import Part, ThinkingStream
from streamchat.chat.told import resumed_sentence, undone_sentence
from streamchat.telemetry.log_file import log_path
from streamchat.units import human_seconds, plural

Kind = Literal["reply", "thought", "end", "eviction", "info", "warning", "error", "stats", "answer", "said", "again"]
SHOWN_AGAIN = 3
"""Turns of a resumed conversation that are written."""


@dataclass(frozen=True)
class Piece:
    """Something to write."""

    kind: Kind
    """`reply` and `thought`: text to append as it is; `end`: the reply is over, the text ends its line where that is
    open; all others: a line of their own."""
    text: str = ""


class Narrator:
    """Turns the events of one engine into pieces, in order.

    Args:
        thinking: Tells what is shown of a reply's reasoning, as the setting of that name.
    """

    def __init__(self, thinking: Callable[[], str]) -> None:
        self._thinking = thinking
        self._stream, self._parts = PrintableStream(), ThinkingStream()
        self._thought_words = 0
        self._evicted: ev.TokensEvicted | None = None
        self._held: list[Piece] = []
        self._speaking = False
        self._said = ""  # the last character shown of this reply
        self._left = False  # an eviction of this turn was told

    def take(self, event: ev.Event) -> list[Piece]:
        """What `event` adds."""
        match event:
            case ev.TurnStarted():
                self._stream, self._parts = PrintableStream(), ThinkingStream()
                self._speaking, self._said, self._thought_words, self._left = False, "", 0, False
            case ev.TokensEvicted(trigger="between_turns") if not self._speaking:
                self._left = True
                return [Piece("eviction", eviction_sentence(event))]
            case ev.TokensEvicted():
                self._evicted = merged(self._evicted, event)
            case ev.TextDelta(text=text):
                # what a long prompt pushed out is said before the reply begins
                before = [] if self._speaking else self._eviction()
                self._speaking = True
                return [*before, *self._told(self._parts.feed(self._stream.feed(text)))]
            case ev.TurnFinished():
                return self._finish(event)
            case ev.Notice(text=text, level=level):
                piece = Piece(level, printable(text))
                if not self._speaking:
                    return [piece]
                self._held.append(piece)
            case ev.ConversationCleared():
                return [Piece("info", cleared_sentence(event))]
            case ev.TurnUndone() if not event.replaced or event.restored or event.read_again:
                return [Piece("info", undone_sentence(event))]
            case ev.SummaryReady(text=text) if text:
                return [
                    Piece("answer", printable(text)),
                    Piece("info", "/keep with this text pins it; change it first"),
                ]
            case ev.ConversationResumed():
                return resumed_pieces(event)
            case ev.TurnPinned():
                what = "pinned: it stays in the cache" if event.pinned else "unpinned"
                return [Piece("info", f"turn {event.turn} ({plural(event.tokens, 'token')}) is {what}")]
            case _:
                pass
        return []

    def _told(self, parts: list[Part]) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            if part.kind == "thought":
                self._thought_words += len(part.text.split())
                if self._thinking() == "show":
                    pieces.append(Piece("thought", part.text))
                continue
            if self._thought_words:
                pieces += self._after_thoughts()
            self._said = part.text[-1:] or self._said
            pieces.append(Piece("reply", part.text))
        return pieces

    def _after_thoughts(self) -> list[Piece]:
        words, self._thought_words = self._thought_words, 0
        if self._thinking() == "show":
            return [Piece("thought", "\n\n")]
        if self._thinking() == "collapse":
            return [Piece("stats", f"(thought for about {plural(words, 'word')}; /set thinking show prints them)")]
        return []

    def _finish(self, event: ev.TurnFinished) -> list[Piece]:
        rest = [*self._parts.feed(self._stream.end()), *self._parts.end()]
        pieces = self._told(rest) if self._speaking else []
        # an empty reply is an empty line, a turn that was taken back before it spoke is none
        line_open = self._said != "\n" if self._said else not event.rolled_back
        pieces += [Piece("end", "\n" if line_open else ""), *self._eviction(), *self._held]
        self._held, self._speaking = [], False
        if event.rolled_back and self._left:
            pieces.append(Piece("eviction", "what had left the cache for it is seen again"))
        reason = reason_piece(event)
        return [*pieces, *([reason] if reason else []), Piece("stats", stats_line(event.stats))]

    def _eviction(self) -> list[Piece]:
        event, self._evicted = self._evicted, None
        return [Piece("eviction", eviction_sentence(event))] if event else []


def resumed_pieces(event: ev.ConversationResumed) -> list[Piece]:
    """Which conversation goes on, and its latest turns."""
    pieces = []
    if len(event.turns) > SHOWN_AGAIN:
        pieces.append(Piece("stats", f"({plural(len(event.turns) - SHOWN_AGAIN, 'earlier turn')})"))
    for turn in event.turns[-SHOWN_AGAIN:]:
        pieces += [Piece("said", printable(turn.text)), Piece("again", printable(turn.reply))]
    return [*pieces, Piece("info", printable(resumed_sentence(event)))]


def reason_piece(event: ev.TurnFinished) -> Piece | None:
    """What to say of a turn that did not end by itself."""
    match event.finish_reason:
        case "length":
            return Piece(
                "warning", f"the reply was cut off after {plural(event.stats.new_tokens, 'token')} (max_new_tokens)"
            )
        case "cancelled" if event.rolled_back:
            return Piece("info", "stopped before the reply began; the message was taken back")
        case "cancelled":
            return Piece("info", "stopped; what was said stays in the conversation")
        case "error":
            message = printable(event.message) or "the turn failed and was taken back"
            return Piece("error", f"{message} (the log is {log_path()})")
        case _:
            return None


def stats_line(stats: ev.TurnStats) -> str:
    """`12 tokens · 35.1 tok/s · first token 45 ms · cache 300/1,024`."""
    parts = [plural(stats.new_tokens, "token")]
    if stats.decode_tps is not None:
        parts.append(f"{stats.decode_tps:.1f} tok/s")
    if stats.ttft_s is not None:
        parts.append(f"first token {human_seconds(stats.ttft_s)}")
    parts.append(f"cache {stats.cache_len:,}/{stats.cache_size:,}")
    return " · ".join(parts)


def cleared_sentence(event: ev.ConversationCleared) -> str:
    """The confirmation of `/clear` and `/system`."""
    if not event.pinned_tokens:
        return "the conversation starts over"
    return f"the conversation starts over; the system prompt is pinned ({plural(event.pinned_tokens, 'token')})"


def ready_sentence(info: ev.ModelInfo) -> str:
    """What is loaded and how, once at the start."""
    text = (
        f"{info.name} on {info.device}, {info.precision}; cache {plural(info.cache_size, 'token')} "
        f"({retained_words(info)}); /help lists the commands"
    )
    return printable(text)
