"""Works on calls: finds the session that a call continues, puts it into a seat, and runs the turn there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streamchat.base.errors import ConfigError, MissingSessionError, SessionError, StoreError, describe_unexpected
from streamchat.server.calls import Call, Exchange, Prompt
from streamchat.server.claims import Claims
from streamchat.server.errors import ApiError
from streamchat.server.known import DEPTH, KnownSession, KnownSessions, Match, ReplyId, best_match, exchange_key
from streamchat.server.live_sessions import CallCancelledError, LiveSessions
from streamchat.server.reporter import Reporter, stopped
from streamchat.server.seat import Seat

if TYPE_CHECKING:
    from streamchat.server.saved_sessions import SavedSessions

_log = logging.getLogger(__name__)


class Service:
    """Works on calls, each in a task of its own. Used on the model's thread.

    Args:
        known: The sessions that the server knows.
        live: Those whose caches are in memory.
        saved: Finds others in the store; None if nothing is saved.
        wait: Lets the running task wait for a condition.
        claims: The session that each call works on.
    """

    def __init__(
        self,
        known: KnownSessions,
        live: LiveSessions,
        saved: SavedSessions | None,
        wait: Callable[[Callable[[], bool]], None],
        claims: Claims,
    ) -> None:
        self._known, self._live, self._saved, self._wait, self._claims = known, live, saved, wait, claims

    def work(self, call: Call) -> None:
        """Reply to a call; report its news, and every failure as an error."""
        try:
            self._work(call)
        except CallCancelledError:
            call.report(stopped())
        except ApiError as error:
            call.report(error)
        except ConfigError as error:
            call.report(ApiError(400, str(error), code="invalid_value"))
        except SessionError as error:
            call.report(ApiError(409, str(error), code="session_in_use"))
        except StoreError as error:
            call.report(ApiError(503, str(error), code="store_failed"))
        except Exception as error:
            _log.exception("a request failed")
            call.report(ApiError(500, f"unexpected {describe_unexpected(error)}", code="internal_error"))

    def _work(self, call: Call) -> None:
        try:
            session, is_new = self._claimed(call)
            self._reply(call, session, is_new)
        finally:
            self._claims.free(call)

    # --- which session ----------------------------------------------------------------------------------------

    def _claimed(self, call: Call) -> tuple[KnownSession, bool]:
        """Return the session that a call continues, marked as busy, and whether it is a new one."""
        while True:
            if call.cancelled.is_set():
                raise CallCancelledError
            found = self._find(call)
            if found is None:
                return self._new_session(call), True
            if self._is_deleted(found):
                self._known.remove(found)
            elif not found.is_busy:
                return self._claims.claim(call, found), False
            else:
                self._wait_for(found, call)

    def _wait_for(self, session: KnownSession, call: Call) -> None:
        self._wait(lambda: not session.is_busy or call.cancelled.is_set())

    def _is_deleted(self, session: KnownSession) -> bool:
        """Return whether another program has deleted a session from the store."""
        if self._saved is None or session.is_live or session.is_busy or not session.is_saved:
            return False
        return self._saved.find(session.id) is None

    def _find(self, call: Call) -> KnownSession | None:
        prompt = call.prompt
        if prompt.previous:
            return self._session_of(prompt)
        match = self._known.match(prompt.history, prompt.system, prompt.scope)
        if (match is None or match.exchanges < len(prompt.history)) and self._saved is not None and prompt.history:
            for session in self._saved.candidates(prompt, self._known):
                self._known.add(session)
            match = self._known.match(prompt.history, prompt.system, prompt.scope)
        return None if match is None else match.session

    def _session_of(self, prompt: Prompt) -> KnownSession:
        parts = ReplyId.parse(prompt.previous)
        session = None if parts is None else self._known.get(parts.session)
        if session is None and parts is not None and self._saved is not None:
            session = self._saved.find(parts.session)
            if session is not None:
                self._known.add(session)
        if session is None or (prompt.scope and prompt.scope != session.scope):
            raise _not_found(prompt.previous)
        return session

    # --- the reply --------------------------------------------------------------------------------------------

    def _reply(self, call: Call, session: KnownSession, is_new: bool) -> None:
        prompt = call.prompt
        try:
            seat = self._live.seat_of(session, call, is_new=is_new)
        except MissingSessionError:  # deleted since it was found
            if prompt.previous:
                raise _not_found(prompt.previous) from None
            self._known.remove(session)
            self._reply(call, self._new_session(call), True)
            return
        if is_new:
            self._run(call, session, seat, prompt.history)
            return
        match = self._place(call, session)
        if match is None or not self._can_continue(match, session, seat, prompt):
            if prompt.previous:
                is_aside = self._saved is None and not prompt.keep
                raise _too_old(prompt.previous, *(("the newest one, while nothing is saved,",) if is_aside else ()))
            self._reply(call, self._new_session(call), True)
            return
        session = self._continue_after(match.turns, session, seat, call)
        self._run(call, session, seat, prompt.history[match.exchanges :], match.turns)

    def _can_continue(self, match: Match, session: KnownSession, seat: Seat, prompt: Prompt) -> bool:
        """Return whether the later turns can be undone, and need not come back if nothing is saved."""
        if self._saved is None and not prompt.keep and match.turns < len(session.keys):
            return False
        return seat.can_undo_after(match.turns)

    def _new_session(self, call: Call) -> KnownSession:
        prompt = call.prompt
        session = KnownSession(prompt.system, prompt.scope, prompt.keep and self._saved is not None)
        self._known.add(session)
        return self._claims.claim(call, session)

    def _place(self, call: Call, session: KnownSession) -> Match | None:
        """Return where a call continues a live session; None if it does not after all."""
        prompt = call.prompt
        if not prompt.previous:
            return best_match([exchange_key(each) for each in prompt.history], [session])
        parts = ReplyId.parse(prompt.previous)
        assert parts is not None
        if 0 < parts.turn < len(session.keys) - DEPTH:
            raise _too_old(prompt.previous)
        if parts.turn > len(session.keys) or session.stamps.get(parts.turn) != parts.stamp:
            raise _not_found(prompt.previous)
        if prompt.has_system and prompt.system != session.system:
            raise ApiError(
                400,
                "instructions differ from those of previous_response_id; they are pinned at the start of its session, "
                "so leave them out, or start without previous_response_id",
                "instructions",
                "invalid_value",
            )
        return Match(session, parts.turn, 0, True)

    def _continue_after(self, turns: int, session: KnownSession, seat: Seat, call: Call) -> KnownSession:
        """Make `seat` continue after a turn; return the session there, which is another one if this one must stay."""
        prompt = call.prompt
        is_longer = turns < len(session.keys)
        if not is_longer and (prompt.keep or self._saved is None):
            return session
        if prompt.keep and (self._saved is None or session.may_replace_after(turns, prompt.message)):
            seat.undo_after(turns)
            return session
        branch = session.copy(turns)
        branch.keep = prompt.keep and self._saved is not None
        self._known.add(self._claims.claim(call, branch))
        seat.branch(branch)
        if not session.is_saved:
            self._known.remove(session)
        if is_longer:
            seat.undo_after(turns)
        return branch

    def _run(
        self, call: Call, session: KnownSession, seat: Seat, given: Sequence[Exchange], turns: int | None = None
    ) -> None:
        """Add the given turns to a live session, and reply.

        Args:
            call: The call.
            session: The session.
            seat: Its seat.
            given: Turns of the client's history that it lacks.
            turns: Number of its turns; None for a new session.
        """
        reporter = Reporter(call, session, seat)
        seat.listener = reporter.receive
        try:
            for exchange in given:
                if call.cancelled.is_set():
                    raise CallCancelledError
                seat.quote(call, exchange.message or "", exchange.reply)
                if reporter.has_failed:
                    return
            reporter.is_given = False
            seat.run(call, call.prompt.message, call.prompt.settings, call.prompt.stop)
        finally:
            seat.listener = None
            self._live.abandon_lost(seat)
            if not call.prompt.keep:
                self._drop(session, seat, turns)

    def _drop(self, session: KnownSession, seat: Seat, turns: int | None) -> None:
        """Remove what is not kept: the session, or its new turns if nothing is saved and it goes on without them."""
        if self._saved is not None or turns is None:
            self._live.drop(session)
        elif len(seat.conversation.log.turns) > turns:
            seat.undo_after(turns)


def _not_found(text: str) -> ApiError:
    return ApiError(
        404,
        f"no response has the id {text[:80]}; its session was deleted, it was not stored, or it is of another user",
        "previous_response_id",
        "previous_response_not_found",
    )


def _too_old(text: str, limit: str = f"the last {DEPTH}") -> ApiError:
    return ApiError(
        400,
        f"the response {text[:80]} is too old to continue from; only {limit} of a session can be continued",
        "previous_response_id",
        "previous_response_too_old",
    )
