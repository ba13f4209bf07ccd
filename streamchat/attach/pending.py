"""The pending requests of a front end: those that the server has not received, and turns that it has not finished."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from streamchat.attach.frames import Asked
from streamchat.base import events as ev
from streamchat.base.requests import Compact, CountTokens, Edit, Quote, Request, Retry, Submit, TurnRequest, Undo
from streamchat.base.sanitize import encodable
from streamchat.engine.missing_turn import missing_turn

NEWEST = 8
"""Number of newest turns in which a message is looked up after the connection was lost for long."""


@dataclass(frozen=True)
class _Turn:
    number: int
    request: TurnRequest

    @property
    def text(self) -> str | None:
        """Its message; None if it has none, or repeats an earlier one."""
        return None if isinstance(self.request, Retry | Compact) else encodable(self.request.text)


class PendingRequests:
    """Numbers the requests and keeps those that are not done. Not thread-safe."""

    def __init__(self) -> None:
        self._last = 0
        self._unreceived: list[Asked] = []
        self._turns: list[_Turn] = []
        self._counts: dict[int, str] = {}
        """The texts whose tokens are to be counted, by the number of the request."""
        self._edits = False
        """Whether the user wants to edit the message of the turn to be undone."""

    @property
    def busy(self) -> bool:
        """Whether a turn of this front end runs or waits."""
        return bool(self._turns)

    @property
    def unreceived_texts(self) -> list[str]:
        """Messages that the server has not received."""
        requests = [asked.request for asked in self._unreceived]
        return [request.text for request in requests if isinstance(request, Submit | Edit)]

    def add(self, request: Request) -> Asked:
        """Return the request with its number."""
        self._last += 1
        asked = Asked(self._last, request)
        self._unreceived.append(asked)
        if isinstance(request, CountTokens):
            self._counts[self._last] = request.text
        self._edits |= isinstance(request, Undo) and request.to_edit
        if isinstance(request, TurnRequest):
            self._turns.append(_Turn(self._last, request))
        return asked

    def received(self, number: int) -> None:
        """Note that the server has all requests up to this number."""
        self._unreceived = [asked for asked in self._unreceived if asked.number > number]

    def unreceived(self) -> list[Asked]:
        """Return the requests to send again."""
        return list(self._unreceived)

    def paged_in(self, event: ev.TurnPagedIn) -> None:
        """Note that a turn was paged in instead of quoted."""
        for turn in self._turns:
            if isinstance(turn.request, Quote) and turn.request.turn == event.turn:
                self._turns.remove(turn)
                return

    def is_own(self, event: ev.TurnFinished) -> bool:
        """Note the end of a turn; return whether this front end had requested it."""
        for turn in self._turns:
            if not isinstance(turn.request, Compact) and turn.text in (None, event.text):
                self._turns.remove(turn)
                return True
        return False

    def summarized(self) -> bool:
        """Note the end of a summary; return whether this front end has requested it."""
        for turn in self._turns:
            if isinstance(turn.request, Compact):
                self._turns.remove(turn)
                return True
        return False

    def counted(self, event: ev.TextCounted) -> None:
        """Note that the tokens of a text were counted."""
        self._counts = {number: text for number, text in self._counts.items() if text != event.text}

    def undone_to_edit(self) -> bool:
        """Note that a turn was undone to edit its message; return whether this front end has requested it."""
        is_own, self._edits = self._edits, False
        return is_own

    def ends_before(self, events: Iterable[ev.Event], unfinished: Collection[int]) -> list[ev.Event]:
        """Return the ends of the requests whose end was missed, given a new state of the session.

        A message that the session does not have is given back: its turn counts as rolled back. Tokens that were not
        counted are reported as 0.

        Args:
            events: The events of the state.
            unfinished: Numbers of the turns that still run or wait.
        """
        waiting = {asked.number for asked in self._unreceived} | set(unfinished)
        gone = [turn for turn in self._turns if turn.number not in waiting]
        self._turns = [turn for turn in self._turns if turn.number in waiting]
        known: list[str] = []
        for event in events:
            if isinstance(event, ev.ConversationResumed):
                known += [turn.text for turn in event.turns[-NEWEST:]] + [event.restored_message]
            elif isinstance(event, ev.TurnStarted):
                known.append(event.text)
        counted = [ev.TextCounted(text, 0) for number, text in self._counts.items() if number not in waiting]
        self._counts = {number: text for number, text in self._counts.items() if number in waiting}
        return [*(_end_of(turn, known) for turn in gone), *counted]


def _end_of(turn: _Turn, known: list[str]) -> ev.Event:
    match turn.request:
        case Compact():
            return ev.SummaryReady("", (0, 0))
        case Quote() | Retry():
            return missing_turn("")
        case _ if turn.text in known:
            return missing_turn("", rolled_back=False)
        case _:
            return missing_turn(turn.text or "")
