"""From events to what is written: reply text as it comes, and lines about it. Writes nothing itself.

A line never lands inside a streamed reply: what happens there (evictions, notices) is held until the reply is over,
evictions merged into one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from streamchat.base import events as ev
from streamchat.base.formatting import human_seconds, plural
from streamchat.base.sanitize import PrintableStream, printable
from streamchat.base.thinking import ONLY_REASONING, Part, ThinkingStream, split, word_count
from streamchat.frontend.evictions import eviction_sentence, merged
from streamchat.frontend.messages import resumed_sentence, undone_sentence
from streamchat.frontend.status import retained_words
from streamchat.telemetry.log_file import log_path

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
        self._thoughts = ""  # since the answer, or from the start
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
                self._speaking, self._said, self._thoughts, self._left = False, "", "", False
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
            case ev.TurnUndone() if not event.replaced or event.restored or event.prefilled:
                return [Piece("info", undone_sentence(event))]
            case ev.SummaryReady(text=text) if text:
                return [
                    Piece("answer", printable(text)),
                    Piece("info", "/keep with this text pins it; change it first"),
                ]
            case ev.ConversationResumed():
                return resumed_pieces(event, self._thinking())
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
                self._thoughts += part.text
                if self._thinking() == "show":
                    pieces.append(Piece("thought", part.text))
                continue
            if self._thoughts:
                shown = self._thinking() == "show"
                pieces += [Piece("thought", "\n\n")] if shown else thought_pieces(self._thoughts, self._thinking())
                self._thoughts = ""
            self._said = part.text[-1:] or self._said
            pieces.append(Piece("reply", part.text))
        return pieces

    def _finish(self, event: ev.TurnFinished) -> list[Piece]:
        rest = [*self._parts.feed(self._stream.end()), *self._parts.end()]
        pieces = self._told(rest) if self._speaking else []
        if self._thoughts and not self._said and self._thinking() != "show" and not event.rolled_back:
            self._held = [*only_thought_pieces(self._thoughts), *self._held]
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


def resumed_pieces(event: ev.ConversationResumed, thinking: str) -> list[Piece]:
    """Which conversation goes on, and its latest turns."""
    pieces = []
    if len(event.turns) > SHOWN_AGAIN:
        pieces.append(Piece("stats", f"({plural(len(event.turns) - SHOWN_AGAIN, 'earlier turn')})"))
    for turn in event.turns[-SHOWN_AGAIN:]:
        pieces.append(Piece("said", printable(turn.text)))
        thoughts, answer = split(printable(turn.reply))
        if thoughts and (answer or thinking == "show"):
            pieces += thought_pieces(thoughts, thinking)
        elif thoughts:
            pieces += only_thought_pieces(thoughts)
        if answer or not thoughts:
            pieces.append(Piece("again", answer))
    return [*pieces, Piece("info", printable(resumed_sentence(event)))]


def thought_pieces(thoughts: str, thinking: str) -> list[Piece]:
    """The whole reasoning before an answer, as the setting `thinking` shows it."""
    if thinking == "show":
        return [Piece("thought", f"{thoughts}\n\n")]
    if thinking == "collapse":
        return [Piece("stats", f"(thought for {word_count(thoughts)}; /set thinking show prints them)")]
    return []


def only_thought_pieces(thoughts: str) -> list[Piece]:
    """Why a reply is empty that has reasoning and no answer."""
    return [Piece("stats", f"({ONLY_REASONING}: {word_count(thoughts)}; /set thinking show prints them)")]


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
