"""Turns the events of a running request into its news."""

from __future__ import annotations

from streamchat.base import events as ev
from streamchat.base.thinking import Part, ThinkingStream
from streamchat.server.calls import Began, Call, Delta, Ended, Usage
from streamchat.server.errors import ApiError
from streamchat.server.known import KnownSession, ReplyId
from streamchat.server.seat import Seat

_FAILURES = {"cache_full": (400, "context_length_exceeded"), "out_of_memory": (503, "out_of_memory")}


class Reporter:
    """Reports the news of one call.

    Args:
        call: The call.
        session: The session that replies, live in `seat`.
        seat: Its seat, before anything is prefilled for the call.
    """

    def __init__(self, call: Call, session: KnownSession, seat: Seat) -> None:
        self._call, self._session, self._seat = call, session, seat
        is_new = not seat.conversation.log.turns
        self._start = 0 if is_new else len(seat.conversation.log)
        self._seen = 0
        self._thinking = ThinkingStream()
        self.is_given = True
        """Whether a turn of the client's history is running, not that of the reply."""
        self.has_failed = False
        """Whether an error was reported."""

    def receive(self, event: ev.Event) -> None:
        """Report what an event means for the client."""
        match event:
            case ev.TurnFinished(finish_reason="error"):
                self._fail(event)
            case _ if self.is_given:
                pass
            case ev.TurnStarted(turn=turn):
                self._call.report(Began(str(ReplyId(self._session.id, turn, self._session.stamps[turn]))))
            case ev.PrefillProgress(done=done, total=total) if done == total:
                self._seen = self._seat.conversation.cache.length
            case ev.TextDelta(text=text):
                self._report_text(self._thinking.feed(text))
            case ev.TurnFinished():
                self._finish(event)
            case _:
                pass

    def _finish(self, event: ev.TurnFinished) -> None:
        if event.rolled_back:
            self._call.report(stopped())
            return
        self._report_text(self._thinking.end())
        if not self._call.prompt.is_response:
            self._session.completions.add(event.stats.turn)
        assert event.finish_reason != "error"
        if self._seat.is_lost:
            self.has_failed = True
            self._call.report(not_saved())
            return
        saved = self._call.prompt.keep and self._seat.is_saved
        self._call.report(Ended(event.finish_reason, self._usage(event), saved))

    def _usage(self, event: ev.TurnFinished) -> Usage:
        turn = self._seat.conversation.log.turns[-1]
        prefilled = (turn.prompt_end or 0) - self._start + self._seat.prefilled_again
        cached = max(0, self._seen - prefilled)
        return Usage(cached + prefilled, cached, event.stats.new_tokens)

    def _report_text(self, parts: list[Part]) -> None:
        for part in parts:
            self._call.report(Delta(part.kind, part.text))

    def _fail(self, event: ev.TurnFinished) -> None:
        self.has_failed = True
        status, code = _FAILURES.get(event.failure, (500, "turn_failed"))
        self._call.report(ApiError(status, event.message, code=code))


def not_saved() -> ApiError:
    """Return the error of a call whose reply does not count, because it is not saved."""
    return ApiError(
        503,
        "the reply could not be saved, or another replica has taken over its session; send the request again",
        code="not_saved",
    )


def stopped() -> ApiError:
    """Return the error of a call that was cancelled before its reply started."""
    return ApiError(503, "the request was stopped before its reply started; send it again", code="stopped")
