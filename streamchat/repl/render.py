"""Converts events to lines and pieces of lines: notices and streamed reply text. Does no I/O.

A notice never interrupts a streamed reply: evictions (merged into one line) and notices are deferred until it ends.
"""

from __future__ import annotations

from collections.abc import Callable

from streamchat.base import events as ev
from streamchat.base.formatting import plural
from streamchat.base.sanitize import PrintableStream, printable
from streamchat.base.thinking import ONLY_REASONING, Part, ThinkingStream, split, word_count
from streamchat.frontend.messages import EVICTED_RESTORED, thought_for
from streamchat.frontend.presenter import Line, merge_evictions, present

RESUMED_TURNS = 3
"""Turns of a resumed session to print."""


class Narrator:
    """Turns the events of one engine into lines and pieces of lines, in order.

    Args:
        thinking: Returns the setting `thinking`: how reasoning is displayed.
    """

    def __init__(self, thinking: Callable[[], str]) -> None:
        self._thinking = thinking
        self._stream, self._parts = PrintableStream(), ThinkingStream()
        self._thoughts = ""  # reasoning since the last answer text
        self._evicted: ev.TokensEvicted | None = None
        self._deferred: list[Line] = []
        self._streaming = False
        self._last_character = ""  # last printed character of this reply
        self._reported_eviction = False  # an eviction of this turn was reported

    def pieces_for(self, event: ev.Event) -> list[Line]:
        """The pieces to print for `event`."""
        match event:
            case ev.TurnStarted():
                self._stream, self._parts = PrintableStream(), ThinkingStream()
                self._streaming, self._last_character, self._thoughts, self._reported_eviction = False, "", "", False
            case ev.TokensEvicted(trigger="between_turns") if not self._streaming:
                self._reported_eviction = True
                return _presented(event)
            case ev.TokensEvicted():
                self._evicted = merge_evictions(self._evicted, event)
            case ev.TextDelta(text=text):
                # evictions during prefill are reported before the reply
                before = [] if self._streaming else self._eviction()
                self._streaming = True
                return [*before, *self._reply_pieces(self._parts.feed(self._stream.feed(text)))]
            case ev.TurnFinished():
                return self._finish(event)
            case ev.Notice() if self._streaming:
                self._deferred += _presented(event)
            case ev.ConnectionChanged() if self._streaming:
                return [Line("end", "\n"), *_presented(event)]
            case ev.SummaryReady(text=text) if text:
                return [Line("answer", printable(text)), *_presented(event)]
            case ev.ConversationResumed():
                return resumed_pieces(event, self._thinking())
            case _:
                return _presented(event)
        return []

    def _reply_pieces(self, parts: list[Part]) -> list[Line]:
        pieces: list[Line] = []
        for part in parts:
            if part.kind == "thought":
                self._thoughts += part.text
                if self._thinking() == "show":
                    pieces.append(Line("thought", part.text))
                continue
            if self._thoughts:
                shown = self._thinking() == "show"
                pieces += [Line("thought", "\n\n")] if shown else thought_pieces(self._thoughts, self._thinking())
                self._thoughts = ""
            self._last_character = part.text[-1:] or self._last_character
            pieces.append(Line("reply", part.text))
        return pieces

    def _finish(self, event: ev.TurnFinished) -> list[Line]:
        rest = [*self._parts.feed(self._stream.end()), *self._parts.end()]
        pieces = self._reply_pieces(rest) if self._streaming else []
        if self._thoughts and not self._last_character and self._thinking() != "show" and not event.rolled_back:
            self._deferred = [*thought_pieces(self._thoughts, "hide", has_answer=False), *self._deferred]
        # an empty reply prints an empty line, a turn that was rolled back prints none
        line_open = self._last_character != "\n" if self._last_character else not event.rolled_back
        pieces += [Line("end", "\n" if line_open else ""), *self._eviction(), *self._deferred]
        self._deferred, self._streaming = [], False
        if event.rolled_back and self._reported_eviction:
            pieces.append(Line("eviction", EVICTED_RESTORED))
        return [*pieces, *_presented(event)]

    def _eviction(self) -> list[Line]:
        event, self._evicted = self._evicted, None
        return _presented(event) if event else []


def _presented(event: ev.Event) -> list[Line]:
    """The line of an event, if any. Progress and a failure go to stderr separately."""
    line = present(event)
    return [] if line is None or line.kind in ("progress", "failure") else [line]


def resumed_pieces(event: ev.ConversationResumed, thinking: str) -> list[Line]:
    """The latest turns of a resumed session, and how it was resumed."""
    pieces = []
    if len(event.turns) > RESUMED_TURNS:
        pieces.append(Line("aside", f"({plural(len(event.turns) - RESUMED_TURNS, 'earlier turn')})"))
    for turn in event.turns[-RESUMED_TURNS:]:
        pieces.append(Line("past_message", printable(turn.text)))
        thoughts, answer = split(printable(turn.reply))
        if thoughts:
            pieces += thought_pieces(thoughts, thinking, has_answer=bool(answer))
        if answer or not thoughts:
            pieces.append(Line("past_reply", answer))
    return [*pieces, *_presented(event)]


def thought_pieces(thoughts: str, thinking: str, *, has_answer: bool = True) -> list[Line]:
    """The reasoning of a reply, displayed according to the setting `thinking`; without an answer, never nothing."""
    if thinking == "show":
        return [Line("thought", f"{thoughts}\n\n")]
    if not has_answer:
        return [Line("aside", f"({ONLY_REASONING}: {word_count(thoughts)}; /set thinking show prints them)")]
    if thinking == "collapse":
        return [Line("aside", f"({thought_for(thoughts)}; /set thinking show prints them)")]
    return []
