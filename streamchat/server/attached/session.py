"""A session with front ends: carries out their requests in order, and publishes its events."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from streamchat.base import events as ev
from streamchat.base.errors import StreamchatError, describe_unexpected
from streamchat.base.requests import (
    Clear,
    Compact,
    CountTokens,
    Edit,
    OpenSession,
    Quote,
    Request,
    Retry,
    SetSystemPrompt,
    Stop,
    Submit,
    TurnRequest,
)
from streamchat.base.sanitize import encodable
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import StartedConversation
from streamchat.engine.jobs import Job
from streamchat.engine.missing_turn import missing_turn
from streamchat.server.attached.history import EventHistory
from streamchat.server.attached.host import NewSession, OtherSession, SeatHost
from streamchat.server.claims import Claims, Owner
from streamchat.server.known import KnownSession, KnownSessions
from streamchat.server.live_sessions import CallCancelledError, LiveSessions
from streamchat.server.scheduler import Scheduler
from streamchat.server.seat import Seat
from streamchat.sessions.archive import Archive

if TYPE_CHECKING:  # torch is imported on the model's thread only
    from streamchat.models.sampling import SamplingAdvice

_log = logging.getLogger(__name__)


class Sender(Protocol):
    """A front end that sends requests. All methods are called on the model's thread."""

    def tell(self, event: ev.Event) -> None:
        """Send an event to this front end only."""
        ...

    def done(self, *, moves: bool) -> None:
        """Note that the request was carried out, after all of its events. If it `moves`, a call of `move` follows."""
        ...

    def move(self, wish: NewSession | OtherSession) -> None:
        """Move the front end to another session."""
        ...


@dataclass(frozen=True)
class SharedParts:
    """What all shared sessions of a server use. Used on the model's thread."""

    scheduler: Scheduler
    claims: Claims
    live: LiveSessions
    known: KnownSessions
    advice: SamplingAdvice
    """Sampling settings that the model's makers advise."""
    closing: Closing
    post: Callable[..., None]
    """(function, *arguments): calls the function on the event loop's thread, in order."""


class Closing:
    """Whether the server is stopping."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()


class SharedSession:
    """One session with its front ends.

    Args:
        session: The session.
        configuration: Its settings.
        parts: What all sessions use.
        changed: Called on the event loop's thread after the history has grown.
    """

    def __init__(
        self, session: KnownSession, configuration: Configuration, parts: SharedParts, changed: Callable[[], None]
    ) -> None:
        self.session, self.configuration, self._parts, self._changed = session, configuration, parts, changed
        self.history = EventHistory()
        """Used on the event loop's thread."""
        self.is_dropped = False
        """Whether it gets no events any more: another object stands for its session."""
        self._jobs: deque[Job] = deque()

    @property
    def waiting(self) -> int:
        """Number of requests that run or wait."""
        return len(self._jobs)

    # --- requests, from any thread ----------------------------------------------------------------------------

    def send(self, request: Request, sender: Sender) -> None:
        """Carry out a request after those before it; `Stop` takes effect at once."""
        if isinstance(request, Stop):
            self._parts.scheduler.submit(self._stop)
            return
        job = Job(request)
        self._jobs.append(job)
        self._parts.scheduler.submit(lambda: self._work(job, sender))

    def cancel_all(self) -> None:
        """Stop all turns, because the server is stopping."""
        for job in list(self._jobs):
            job.cancelled.set()

    # --- the model's thread -----------------------------------------------------------------------------------

    def publish(self, event: ev.Event) -> None:
        """Add an event to the history, and send it to the front ends."""
        self._parts.post(self._add, event)

    def _add(self, event: ev.Event) -> None:
        if self.history.add(event):
            self._changed()

    def _stop(self) -> None:
        owner = self._parts.claims.owner_of(self.session)
        if owner is not None and (not isinstance(owner, Job) or isinstance(owner.request, TurnRequest)):
            owner.cancelled.set()  # the running turn, also one of an API client
        else:
            waiting = next((job for job in self._jobs if isinstance(job.request, TurnRequest)), None)
            if waiting is not None:
                waiting.cancelled.set()
        self._parts.scheduler.wake()

    def _work(self, job: Job, sender: Sender) -> None:
        self._parts.scheduler.wait(lambda: self._jobs[0] is job and not self.session.is_busy)
        self._parts.claims.claim(job, self.session)
        wish = None
        try:
            wish = self._carry_out(job, sender)
        except CallCancelledError:
            self._fail(job.request, "")
        except StreamchatError as error:
            self._fail(job.request, str(error))
        except Exception as error:
            _log.exception("a request failed")
            self._fail(job.request, f"unexpected {describe_unexpected(error)}")
        finally:
            self._parts.claims.free(job)
            self._jobs.popleft()
            sender.done(moves=wish is not None)
        if wish is not None:
            sender.move(wish)

    def _carry_out(self, job: Job, sender: Sender) -> NewSession | OtherSession | None:
        try:
            seat = self._seat(job)
        except StreamchatError:
            if (wish := _wish_of(job.request)) is None:
                raise
            return wish  # the front end leaves, so it does not matter that the session cannot be restored
        hosts: list[SeatHost] = []

        def make_host(active: StartedConversation, archive: Archive, emit: Callable[[ev.Event], None]) -> SeatHost:
            hosts.append(SeatHost(self.configuration, active, archive, emit, self._parts.advice, sender.tell))
            return hosts[0]

        seat.carry_out(job, make_host)
        [host] = hosts
        if host.configuration is not self.configuration:
            self.configuration, self.session.settings = host.configuration, host.settings
        return host.wish

    def _fail(self, request: Request, message: str) -> None:
        """Publish the end of a request that could not be carried out: what a front end waits for."""
        match request:
            case CountTokens(text):
                self.publish(ev.TextCounted(text, 0))  # a message would report it each time that somebody types
            case Compact():
                if message:
                    self.publish(ev.Notice(message, "error"))
                self.publish(ev.SummaryReady("", (0, 0)))
            case Submit(text) | Edit(text) | Quote(text):
                self.publish(missing_turn(encodable(text), message))
            case Retry():
                self.publish(missing_turn("", message))
            case _ if message:
                self.publish(ev.Notice(message, "error"))
            case _:
                pass

    def _seat(self, owner: Owner) -> Seat:
        """Return the seat of the session, which is restored there if it is not live.

        Raises:
            StreamchatError: It cannot be restored.
            CallCancelledError: `owner` was stopped while all seats were busy.
        """
        session = self.session
        is_new = not (session.is_live or session.is_saved)
        is_lost = is_new and bool(session.keys)
        if is_new:
            session.cut_after(0)
        was_live, before = session.is_live, list(session.keys)
        seat = self._parts.live.seat_of(session, owner, is_new=is_new)
        if is_new:
            self._parts.known.add(session)
        if before and not was_live and not is_new and session.keys != before:
            self.publish(seat.describe())  # another program has continued it
        if is_lost:
            self.publish(
                ev.ConversationCleared(self.configuration.settings.system_prompt, seat.conversation.state().pinned)
            )
            self.publish(ev.Notice("This conversation is not saved, and another one needed its memory.", "warning"))
        return seat

    # --- the state of the session -----------------------------------------------------------------------------

    def describe(self) -> tuple[ev.Event, ...]:
        """Return the events that show the current session; restore it first if it has no seat.

        Raises:
            StreamchatError: It cannot be restored.
            CallCancelledError: The server is stopping.
        """
        session, parts = self.session, self._parts
        parts.scheduler.wait(lambda: session.is_live or not session.is_busy)
        if session.is_live:
            return self._described(self._seat(parts.closing))
        owner = Closing()
        parts.claims.claim(owner, session)
        try:
            return self._described(self._seat(parts.closing))
        finally:
            parts.claims.free(owner)

    def _described(self, seat: Seat) -> tuple[ev.Event, ...]:
        resumed, conversation = seat.describe(), seat.conversation
        events: list[ev.Event] = []
        notices: tuple[str, ...] = ()
        if seat.restored is not None:
            resumed = seat.restored.applied_to(resumed)
            notices, seat.restored = seat.restored.notices, None
        newest = () if conversation.is_muted else conversation.log.turns[-1:]  # else it is a summary
        running = next((turn for turn in newest if turn.end is None), None)
        if resumed.turns or running is not None or resumed.restored_message:
            if resumed.session:
                events.append(ev.SessionOpened(resumed.session))
            events.append(resumed)
        else:
            events.append(ev.ConversationCleared(resumed.system_prompt, resumed.cache.pinned))
        events.append(ev.ModelReady(resumed.info, 0.0))
        events += map(ev.Notice, notices)
        if running is not None:
            stop = len(conversation.log) if running.reply_start is None else running.reply_start
            events.append(ev.TurnStarted(running.number, running.text, stop - running.start))
            if conversation.shown:
                events.append(ev.TextDelta(running.number, conversation.shown))
        return tuple(events)


def _wish_of(request: Request) -> NewSession | OtherSession | None:
    """Return where a request moves its front end; None if it stays."""
    match request:
        case Clear():
            return NewSession(None)
        case SetSystemPrompt(text):
            return NewSession(encodable(text))
        case OpenSession(session):
            return OtherSession(session)
        case _:
            return None
