"""Skips rendering when turns end faster than they can be drawn, as in a replay at full speed."""

from __future__ import annotations

from collections.abc import Sequence

from streamchat.base import events as ev
from streamchat.frontend.messages import eviction_sentence, recalled_sentence, turn_figures
from streamchat.frontend.presenter import merge_evictions, was_cut
from streamchat.tui.transcript import FinishedTurn

RENDERED_TURNS = 4
"""Newest turns of a batch that are still rendered."""


def collapse_turns(events: Sequence[ev.Event], running: bool) -> list[ev.Event | FinishedTurn]:
    """Replace the events of all complete turns except the newest by a `FinishedTurn` per turn.

    Args:
        events: One batch, in order.
        running: The batch starts within a turn that is already on the screen.
    """
    whole = _whole_turns(events)[1 if running else 0 :]
    folded = dict(whole[:-RENDERED_TURNS])
    out: list[ev.Event | FinishedTurn] = []
    at = 0
    while at < len(events):
        stop = folded.get(at)
        if stop is None:
            out.append(events[at])
            at += 1
            continue
        inside = events[at : stop + 1]
        out += [event for event in inside if not isinstance(event, _TURN_EVENTS)]
        out.append(_finished_turn(inside))
        at = stop + 1
    return out


_TURN_EVENTS = (
    *(ev.TurnStarted, ev.PrefillProgress, ev.TextDelta, ev.TokensEvicted, ev.TurnsRecalled),
    *(ev.TurnFinished, ev.StatusSampled),
)


def _whole_turns(events: Sequence[ev.Event]) -> list[tuple[int, int]]:
    """(index of `TurnStarted`, index of `TurnFinished`) of complete turns that were not rolled back."""
    found, start = [], None
    for i, event in enumerate(events):
        match event:
            case ev.TurnStarted():
                start = i
            case ev.TurnFinished(rolled_back=rolled_back):
                if start is not None and not rolled_back:
                    found.append((start, i))
                start = None
            case ev.ConversationCleared() | ev.EngineFailed():
                found, start = [], None
            case _:
                pass
    return found


def _finished_turn(inside: Sequence[ev.Event]) -> FinishedTurn:
    started, finished = inside[0], inside[-1]
    assert isinstance(started, ev.TurnStarted)
    assert isinstance(finished, ev.TurnFinished)
    evicted: dict[bool, ev.TokensEvicted] = {}
    reply_started = False
    for event in inside:
        reply_started = reply_started or isinstance(event, ev.TextDelta)
        if isinstance(event, ev.TokensEvicted):
            evicted[reply_started] = merge_evictions(evicted.get(reply_started), event)
    return FinishedTurn(
        started.turn,
        started.text,
        finished.reply,
        turn_figures(finished),
        was_cut(finished.finish_reason),
        tuple((eviction_sentence(event), after) for after, event in evicted.items()),
        tuple(recalled_sentence(event) for event in inside if isinstance(event, ev.TurnsRecalled)),
    )
