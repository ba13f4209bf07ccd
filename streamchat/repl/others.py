"""Turns that other front ends of a session make: shown when they are done, so that they do not disturb the input."""

from __future__ import annotations

from streamchat.base import events as ev
from streamchat.base.sanitize import encodable, printable
from streamchat.base.thinking import split
from streamchat.frontend.presenter import Line, present

_PARTS = (ev.PrefillProgress, ev.TokensEvicted, ev.TurnsRecalled, ev.RecallSuggested, ev.TextDelta)


class OtherTurns:
    """Tells the turns of this front end from others. Use it on one thread."""

    def __init__(self) -> None:
        self.sent: str | None = None
        """The message of the running request; None for a command, whose turn can have any text."""
        self.is_waiting = False
        """Whether this front end waits for a turn or a command of its own."""
        self._is_other = False

    def owns(self, event: ev.Event) -> bool:
        """Note an event; return whether it belongs to this front end, or to no turn."""
        match event:
            case ev.TurnStarted(text=text):
                self._is_other = not self.is_waiting or (self.sent is not None and encodable(self.sent) != text)
                return not self._is_other
            case ev.TurnFinished():
                was_other, self._is_other = self._is_other, False
                return not was_other
            case _:
                return not (self._is_other and isinstance(event, _PARTS))


def other_pieces(event: ev.Event) -> list[Line]:
    """Return what to print for an event of another front end's turn."""
    match event:
        case ev.TurnStarted(text=text):
            return [Line("past_message", printable(text))]
        case ev.TurnFinished(rolled_back=False, reply=reply):
            line = present(event)
            thoughts, answer = split(printable(reply))
            return [Line("past_reply", answer or thoughts), *([] if line is None else [line])]
        case _:
            return []
