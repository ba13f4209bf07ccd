"""Decides which line reports an event to the user: the same in app, prompt, pipe and replay. Does no I/O.

How a line looks, and when it appears, is up to each front end: the prompt defers notices until a streamed reply ends,
the app has a widget for some kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from streamchat.base import events as ev
from streamchat.base.sanitize import one_line
from streamchat.frontend import messages
from streamchat.telemetry.log_file import log_path

EventKind = Literal["info", "warning", "error", "eviction", "figures", "cut", "ready", "progress", "failure"]
"""Kinds of lines about events. `figures`: a finished turn; `cut`: the same, with a reply that was cut off; `ready`: the
loaded model; `progress`: of loading or prefill; `failure`: the engine has ended."""
TextKind = Literal["reply", "thought", "end", "aside", "answer", "past_message", "past_reply"]
"""Kinds for text on a terminal. `reply`, `thought`: append the text; `end`: the reply has ended, the text ends an open
line; all others are separate lines."""


@dataclass(frozen=True)
class Line:
    """A line for the user, or a piece of one, safe to print."""

    kind: EventKind | TextKind
    text: str


def present(event: ev.Event) -> Line | None:
    """Return the line that reports `event`; None if it has no line: figures, text, results of commands."""
    line = _line(event)
    return None if line is None else Line(line.kind, one_line(line.text))


def _line(event: ev.Event) -> Line | None:
    match event:
        case ev.ModelLoading():
            return Line("progress", messages.loading_text(event))
        case ev.ModelFetched() if sentence := messages.fetched_sentence(event):
            return Line("error" if event.error else "info", sentence)
        case ev.ModelReady():
            return Line("ready", f"{messages.model_facts(event)}. {messages.cache_capacity(event.info)}")
        case ev.EngineFailed(message=text):
            return Line("failure", text)
        case ev.Notice(text=text, level=level):
            return Line(level, text)
        case ev.ConnectionChanged(works=True):
            return Line("info", "Connected to the server again.")
        case ev.ConnectionChanged(reason=reason):
            return Line("warning", f"The connection to the server is lost ({reason}); connecting again.")
        case ev.PrefillProgress():
            return Line("progress", messages.prefill_text(event))
        case ev.TokensEvicted():
            return Line("eviction", messages.eviction_sentence(event))
        case ev.TurnPinned():
            return Line("info", messages.pinned_sentence(event))
        case ev.TurnPagedIn():
            return Line("info", messages.paged_in_sentence(event))
        case ev.TurnsRecalled():
            return Line("info", messages.recalled_sentence(event))
        case ev.RecallSuggested():
            return Line("info", messages.suggestion_sentence(event))
        case ev.TurnFinished():
            return _finished(event)
        case ev.TurnUndone() if not event.replaced or event.prefilled:
            return Line("info", messages.undone_sentence(event))
        case ev.ConversationRewound():
            return Line("info", messages.rewound_sentence(event))
        case ev.ConversationCleared():
            return Line("info", messages.cleared_sentence(event))
        case ev.ConversationResumed():
            return Line("info", messages.resumed_sentence(event))
        case ev.SummaryReady(text=text) if text:
            return Line("info", messages.SUMMARY_HINT)
        case _:
            return None


def _finished(event: ev.TurnFinished) -> Line:
    if event.finish_reason == "error":
        return Line("error", f"{event.message or messages.TURN_FAILED} (the log is {log_path()})")
    if event.rolled_back:
        return Line("info", messages.STOPPED_EARLY)
    return Line("cut" if was_cut(event.finish_reason) else "figures", messages.turn_figures(event))


def was_cut(reason: ev.FinishReason) -> bool:
    """Whether a reply was cut off: stopped, in a loop, or at the token limit."""
    return reason in ("length", "loop", "cancelled")


def merge_evictions(first: ev.TokensEvicted | None, second: ev.TokensEvicted) -> ev.TokensEvicted:
    """Merge two consecutive evictions; a reply that outgrows the window can evict many times."""
    if first is None:
        return second
    return replace(
        second,
        count=first.count + second.count,
        token_range=(first.token_range[0], second.token_range[1]),
        turns=tuple(sorted({*first.turns, *second.turns})),
        turns_gone=tuple(sorted({*first.turns_gone, *second.turns_gone})),
        cache_len_before=first.cache_len_before,
    )
