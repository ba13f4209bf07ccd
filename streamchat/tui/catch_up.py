"""Skips rendering when turns end faster than they can be drawn, as in a replay at full speed."""

from __future__ import annotations

from collections.abc import Sequence

from streamchat.base import events as ev
from streamchat.frontend.evictions import merged
from streamchat.tui.past import PastTurn
from streamchat.tui.widgets.turn import turn_figures, was_cut

KEEP = 4
"""Newest turns of a batch that are still rendered."""


def caught_up(events: Sequence[ev.Event], running: bool) -> list[ev.Event | PastTurn]:
    """Replace the events of all complete turns except the newest by a `PastTurn` per turn.

    Args:
        events: One batch, in order.
        running: The batch starts within a turn that is already on the screen.
    """
    whole = _whole_turns(events)[1 if running else 0 :]
    folded = dict(whole[:-KEEP])
    out: list[ev.Event | PastTurn] = []
    at = 0
    while at < len(events):
        stop = folded.get(at)
        if stop is None:
            out.append(events[at])
            at += 1
            continue
        inside = events[at : stop + 1]
        out += [event for event in inside if not isinstance(event, _TURN_EVENTS)]
        out.append(_past(inside))
        at = stop + 1
    return out


_TURN_EVENTS = (ev.TurnStarted, ev.PrefillProgress, ev.TextDelta, ev.TokensEvicted, ev.TurnFinished, ev.StatusSampled)


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


def _past(inside: Sequence[ev.Event]) -> PastTurn:
    started, finished = inside[0], inside[-1]
    assert isinstance(started, ev.TurnStarted)
    assert isinstance(finished, ev.TurnFinished)
    evicted: dict[bool, ev.TokensEvicted] = {}
    reply_started = False
    for event in inside:
        reply_started = reply_started or isinstance(event, ev.TextDelta)
        if isinstance(event, ev.TokensEvicted):
            evicted[reply_started] = merged(evicted.get(reply_started), event)
    return PastTurn(
        started.turn,
        started.text,
        finished.reply,
        turn_figures(finished),
        was_cut(finished),
        tuple((event, after) for after, event in evicted.items()),
    )
