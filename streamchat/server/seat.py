"""A place for a live session: a conversation with its cache, which is reused for one session after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.requests import SettingValue, Submit
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import StartedConversation, assemble
from streamchat.engine.jobs import Job, JobQueue
from streamchat.engine.request_handler import RequestHandler, RequestHost
from streamchat.engine.status_sampler import StatusSampler
from streamchat.engine.turn_runner import TurnRunner
from streamchat.server.attachment import Attachment
from streamchat.server.calls import Call
from streamchat.server.known import DEPTH, KnownSession, stamp_of, turn_key
from streamchat.sessions.archive import Archive, ClaimedSession
from streamchat.sessions.resumed_event import resume_notices
from streamchat.store.records import SCOPE

if TYPE_CHECKING:  # torch is imported on the model's thread only
    from streamchat.conversation.conversation import Conversation
    from streamchat.conversation.reply import PreparedFormat
    from streamchat.models.load import LoadedModel

Listener = Callable[[ev.Event], None]
MakeHost = Callable[[StartedConversation, Archive, Callable[[ev.Event], None]], RequestHost]
"""(conversation of a seat, its archive, function that emits its events) -> what front ends may change there."""


@dataclass(frozen=True)
class Restored:
    """What a user must know about a session that was restored."""

    notices: tuple[str, ...]
    message: str
    """A message without a reply, if the server was killed before it started one."""

    def applied_to(self, event: ev.ConversationResumed) -> ev.ConversationResumed:
        """Return the event with the message."""
        return replace(event, restored_message=self.message)


@dataclass(frozen=True)
class SeatParts:
    """What all seats of a server share."""

    configuration: Configuration
    loaded: LoadedModel
    attachment: Attachment
    formats: Callable[[Settings], PreparedFormat]
    """Returns the format of turns with these settings."""
    new_archive: Callable[[Callable[[ev.Event], None]], Archive]
    """Returns an open archive that emits its events to a function."""
    pause: Callable[[], None]
    """Called before each forward pass; lets other seats work."""
    publish: Callable[[KnownSession, ev.Event], None]
    """Called with every event and its session."""
    finish_snapshot: Callable[[str], None]
    """Waits until the snapshot of a session is on the disk."""
    is_shared: bool = False
    """Whether other replicas may continue the sessions; a reply then counts only when it is saved."""


class Seat:
    """Runs the turns of one session at a time. Implements `ConversationHost`. Used on the model's thread.

    Args:
        parts: What all seats share.
    """

    def __init__(self, parts: SeatParts) -> None:
        self._parts = parts
        self.pin_next = False
        self.session: KnownSession | None = None
        """The session that is live here."""
        self.listener: Listener | None = None
        """Receives the events of the request that runs."""
        self.prefilled_again = 0
        """Tokens that had to be prefilled again for the running request, since a snapshot or a copy was missing."""
        self.restored: Restored | None = None
        """What to report of the latest `resume`; whoever reports it sets it to None."""
        self._jobs = JobQueue()
        parts.attachment.use(None)
        self.started: StartedConversation = assemble(parts.configuration, parts.loaded, self._emit, lambda *_: None)
        parts.attachment.adopt(self.conversation)
        self._archive = parts.new_archive(self._publish)
        self._status = StatusSampler(self, self._jobs, self._archive, self._publish)
        self._turns = TurnRunner(self, self._jobs, self._archive, self._status, self._emit, self._pause)

    # --- ConversationHost -------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings of the server."""
        return self._parts.configuration.settings

    @property
    def active(self) -> StartedConversation:
        """The conversation."""
        return self.started

    @property
    def conversation(self) -> Conversation:
        """The conversation."""
        return self.started.conversation

    # --- which session ----------------------------------------------------------------------------------------

    def start(self, session: KnownSession) -> None:
        """Start a new session; the seat is free."""
        self._take(session, prefill=True)
        self._record()

    def resume(self, session: KnownSession) -> None:
        """Restore a saved session; the seat is free.

        Raises:
            SessionError: It does not exist, or another process has it open.
        """
        claimed = self._archive.claim(session.id)
        try:
            self._take(session, prefill=False)
            self._restore(session, claimed)
        except BaseException:
            claimed.lock.release()
            self.session, session.is_live = None, False
            raise

    def _restore(self, session: KnownSession, claimed: ClaimedSession) -> None:
        stored, result = self._archive.restore_into(self.started, claimed)
        notices = resume_notices(stored, result, self.conversation.cache.cache_size)
        self.restored = Restored(tuple(notices), result.message_back)
        self.prefilled_again += result.read_again
        turns = self.conversation.log.turns
        session.set_turns(turn_key(turn.text, turn.reply) for turn in turns)
        newest = stored.turns[-DEPTH - 1 :]
        session.stamps = {turn.number: stamp_of(turn.started) for turn in newest if turn.number <= len(turns)}
        session.cut = {turn.number for turn in newest if turn.finish_reason == "cancelled"} | {result.cut_turn}

    def branch(self, session: KnownSession) -> None:
        """Continue the conversation as another session; the one that was here goes to the disk."""
        assert self.session is not None
        self._save()
        self.session.is_live = False
        self.session, session.is_live = session, True
        self._record()

    @property
    def is_lost(self) -> bool:
        """Whether the session must not continue here: another replica owns it, or its latest turn was not saved."""
        return self._parts.is_shared and self._archive.is_lost

    @property
    def is_saved(self) -> bool:
        """Whether all finished turns of the session are in the store."""
        recorder = self._archive.recorder
        return recorder is not None and recorder.is_saved

    def abandon(self) -> None:
        """Free the seat without saving; the session is restored when it is needed again."""
        self._archive.abandon()
        if self.session is not None:
            self.session.is_live, self.session = False, None

    def release(self) -> None:
        """Save the session and free the seat; its buffers stay allocated."""
        if self.session is not None:
            self._save()
            self.session.is_live, self.session = False, None

    def can_undo_after(self, turns: int) -> bool:
        """Return whether all turns after the first `turns` can be undone."""
        log = self.conversation.log
        return turns == len(log.turns) or log.turns[turns].before is not None

    def undo_after(self, turns: int) -> None:
        """Undo all turns after the first `turns`.

        Raises:
            ConfigError: They are too old.
        """
        assert self.session is not None
        undone = self.conversation.log.turns[turns:]
        result = self.conversation.undo(turns + 1, restore_rng=False)
        self.prefilled_again += result.read_again
        if self.session.keep:
            self._archive.record_undo(turns + 1)
        for turn in reversed(undone):
            self._publish(ev.TurnUndone(turn.number, turn.text, turn.reply, self.conversation.state(), replaced=True))

    def close(self) -> None:
        """Save the session and close the archive."""
        self._use()
        self.release()
        self._archive.close()
        self._parts.attachment.use(None)

    def _take(self, session: KnownSession, *, prefill: bool) -> None:
        self._use()
        prompt = self.settings.system_prompt if session.system is None else session.system
        settings = session.settings or replace(self.settings, system_prompt=prompt)
        chat_format = self._parts.formats(settings)
        self.session, session.is_live = session, True
        self.conversation.settings, self.pin_next = settings, False
        self.conversation.start_over(chat_format, prefill=prefill)
        self.conversation.reseed()

    def _record(self) -> None:
        """Record the new session, if it is kept."""
        recorder, session = self._archive.recorder, self.session
        if recorder is not None and session is not None and session.keep:
            recorder.labels = {SCOPE: session.scope} if session.scope else {}
            self._archive.start(self.started)

    def _save(self) -> None:
        """Save everything and close the session; its cache is written later."""
        if self.is_lost:
            self._archive.abandon()
        else:
            self._archive.leave(self.started)

    # --- turns ------------------------------------------------------------------------------------------------

    def run(self, call: Call, text: str, settings: Mapping[str, SettingValue], stop: tuple[str, ...]) -> None:
        """Reply to `text`, with these settings and stop strings for this reply only."""
        conversation = self.conversation
        usual = conversation.settings
        chosen: dict[str, Any] = dict(settings)
        conversation.settings, conversation.stop_strings = replace(usual, **chosen), stop
        if "seed" in settings:
            conversation.reseed()
        try:
            self._turns.run(self._job(call, text), text)
        finally:
            conversation.settings, conversation.stop_strings = usual, ()

    def quote(self, call: Call, text: str, reply: str) -> None:
        """Add a turn with a given reply."""
        self._turns.run(self._job(call, text), text, reply=reply)

    def carry_out(self, job: Job, make_host: MakeHost) -> None:
        """Carry out a request of a front end, as the engine of a chat does."""
        self._use()
        self._jobs.put_job(job)
        self._jobs.get(0.1)
        host = make_host(self.started, self._archive, self._emit)
        RequestHandler(host, self._turns, self._archive, self._status, self._emit).handle(job)

    def describe(self) -> ev.ConversationResumed:
        """Return the state of the session, without a turn that runs."""
        return self._archive.describe(self.started)

    def sample(self) -> None:
        """Publish the figures of the live session."""
        if self.session is not None:
            self._status.sample()

    def _job(self, call: Call, text: str) -> Job:
        self._use()
        self._jobs.put(Submit(text))
        job = self._jobs.get(0.1)
        assert job is not None
        job.cancelled = call.cancelled
        return job

    def _use(self) -> None:
        self._parts.attachment.use(self.conversation)

    def _pause(self) -> None:
        self._parts.pause()
        self._use()

    # --- events -----------------------------------------------------------------------------------------------

    def _emit(self, event: ev.Event) -> None:
        """Record and publish an event; sample the figures if it is due."""
        if self.session is None:
            return
        if self._parts.is_shared and isinstance(event, ev.TurnFinished) and not event.rolled_back:
            self._snapshot_if_due(event.stats.turn)
        self._archive.record(event)
        self._publish(event)
        self._status.sample_if_due()

    def _snapshot_if_due(self, turn: int) -> None:
        """Write the cache before the turn is recorded: whoever finds the turn then finds the cache, too."""
        every, session = self.settings.snapshot_turns, self._archive.session
        if every and turn % every == 0 and session is not None:
            self._archive.snapshot(self.started)
            self._parts.finish_snapshot(session)

    def _publish(self, event: ev.Event) -> None:
        session = self.session
        if session is None:
            return
        match event:
            case ev.TurnStarted(turn=turn):
                recorder = self._archive.recorder
                is_recorded = recorder is not None and recorder.session is not None
                started = recorder.started_at(turn) if recorder is not None and is_recorded else time.time()
                session.stamps[turn] = stamp_of(started)
                session.stamps.pop(turn - DEPTH - 1, None)
            case ev.TurnFinished(rolled_back=False, stats=stats, text=text, reply=reply):
                session.add_turn(turn_key(text, reply))
                if event.finish_reason == "cancelled":
                    session.cut.add(stats.turn)
            case ev.TurnUndone(turn=turn):
                session.cut_after(turn - 1)
            case _:
                pass
        self._parts.publish(session, event)
        if self.listener is not None:
            self.listener(event)
