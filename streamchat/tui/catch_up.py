"""When turns end faster than they can be drawn (a replay at full speed), most become data without having been drawn."""

from __future__ import annotations

from collections.abc import Sequence

from streamchat.base import events as ev
from streamchat.frontend.evictions import merged
from streamchat.tui.past import PastTurn
from streamchat.tui.widgets.turn import turn_figures, was_cut

KEEP = 4
"""So many of the newest whole turns of a batch are drawn as usual."""


def caught_up(events: Sequence[ev.Event], running: bool) -> list[ev.Event | PastTurn]:
    """The batch with all but its newest whole turns as `PastTurn`.

    Args:
        events: In order.
        running: The turn that the batch begins in is on the screen already.
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
        out += [event for event in inside if not isinstance(event, _TOLD)]
        out.append(_past(inside))
        at = stop + 1
    return out


_TOLD = (ev.TurnStarted, ev.PrefillProgress, ev.TextDelta, ev.TokensEvicted, ev.TurnFinished, ev.StatusSampled)


def _whole_turns(events: Sequence[ev.Event]) -> list[tuple[int, int]]:
    """(place of `TurnStarted`, place of `TurnFinished`) of turns that began, ended and stayed."""
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
    gone: dict[bool, ev.TokensEvicted] = {}
    writing = False
    for event in inside:
        writing = writing or isinstance(event, ev.TextDelta)
        if isinstance(event, ev.TokensEvicted):
            gone[writing] = merged(gone.get(writing), event)
    return PastTurn(
        started.turn,
        started.text,
        finished.reply,
        turn_figures(finished),
        was_cut(finished),
        tuple((event, after) for after, event in gone.items()),
    )
