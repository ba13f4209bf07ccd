"""Persists the active conversation: record, snapshot, close, restore. Runs on the engine's thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, StoreError
from streamchat.base.formatting import plural
from streamchat.sessions.identities import Identities
from streamchat.sessions.resumed_event import figures_of, resume_notices, resumed_event
from streamchat.sessions.upkeep import Upkeep

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.assemble import StartedConversation
    from streamchat.sessions.evicted_archive import EvictedArchive
    from streamchat.sessions.recorder import Recorder
    from streamchat.sessions.resume import ResumeResult
    from streamchat.store.lock import SessionLock
    from streamchat.store.records import CacheMark, SessionInfo, StoredSession
    from streamchat.store.store import Store

_log = logging.getLogger(__name__)
OpenStore = Callable[[], "Store"]
RETRY_S = 1.0
"""A store that refuses faster than this is tried again after each turn; waiting for a lock would hold up the chat."""
WriteSnapshot = Callable[[str, Callable[[], object]], None]
"""(session id, function that writes its snapshot) -> None; calls the function now or later."""


@dataclass(frozen=True)
class ClaimedSession:
    """A saved session that this process has locked."""

    info: SessionInfo
    lock: SessionLock


class Archive:
    """Saves and restores sessions. Does nothing if saving is off.

    Args:
        open_store: Opens the store; None if nothing is saved.
        emit: Emits an event.
        is_deferred: Save nothing until a session is opened or `start_saving` is called.
        identities: Knows the identity of the model; shared by the archives of a server.
        write: Writes a snapshot; by default at once. A server passes it to another thread.
        upkeep: Whether to maintain the user's database; a server does that once for all of its archives.
    """

    def __init__(
        self,
        open_store: OpenStore | None,
        emit: Callable[[ev.Event], None],
        *,
        is_deferred: bool = False,
        identities: Identities | None = None,
        write: WriteSnapshot | None = None,
        upkeep: bool = True,
    ) -> None:
        self._open_store, self._emit, self._is_deferred = open_store, emit, is_deferred
        self._has_upkeep = upkeep
        self._write = write or _write_now
        self._upkeep: Upkeep | None = None
        self._started: StartedConversation | None = None
        self._is_refused = False
        """Whether the store could not be opened; each turn tries again."""
        self._works = True
        """Whether the front ends believe that the store can be opened."""
        self._identities = identities or Identities()
        self.recorder: Recorder | None = None
        """None if nothing is saved."""
        self._evicted: EvictedArchive | None = None
        self._notices: list[str] = []
        """Sentences for the user from other threads."""
        self.saving = threading.Event()
        """Set while the cache, or what remains to be saved at the end, is written; closing waits for it."""
        self.changed = False
        """Whether the cache differs from the latest snapshot."""

    @property
    def session(self) -> str | None:
        """Id of the current session; None before its first turn."""
        return None if self.recorder is None else self.recorder.session

    @property
    def can_save(self) -> bool:
        """Whether there is a store to save in."""
        return self._open_store is not None

    def open(self, *, required: bool) -> None:
        """Open the store if it is not open. If that fails, the chat continues unsaved unless the store is `required`.

        Saving that is deferred needs no store yet.

        Raises:
            StoreError: The store cannot be opened.
        """
        if self._open_store is None or self.recorder is not None or (self._is_deferred and not required):
            return
        from streamchat.sessions.evicted_archive import EvictedArchive
        from streamchat.sessions.recorder import Recorder

        started = time.monotonic()
        try:
            store = self._open_store()
        except StoreError as error:
            if required:
                raise
            _log.warning("nothing will be saved", exc_info=True)
            self._set_works(False)
            if not self._is_refused:
                self._emit(ev.Notice(f"This conversation is not saved: {error}", "warning"))
            self._is_refused = time.monotonic() - started < RETRY_S
            return
        self._set_works(True)
        self.recorder = Recorder(store, self._emit)
        self._evicted = EvictedArchive(store.evicted, self._notices.append)
        if self._has_upkeep and store.is_user_database:
            self._upkeep = Upkeep(store, self._emit)
            self._upkeep.start_if_due()

    def _set_works(self, works: bool) -> None:
        if works != self._works:
            self._works = works
            self._emit(ev.SavingChanged(works))

    def close(self) -> None:
        """Archive the evicted tokens that wait, and close the session and the store."""
        with self._is_saving():
            if self._evicted is not None:
                self._evicted.close()
                self._evicted = None
            if self.recorder is not None:
                self.recorder.close_session()
                if self._upkeep is not None:
                    self._upkeep.stop()
                self.recorder.store.close()
                self.recorder = self._upkeep = None

    # --- the active conversation --------------------------------------------------------------------------------

    def start(self, active: StartedConversation) -> None:
        """Start recording a new conversation."""
        self.changed = False
        self._started = active if self.recorder is None else None
        if self.recorder is not None:
            self.recorder.start(active.conversation, self._identities.of(active))
            self._archive_evicted(active)

    def _archive_evicted(self, active: StartedConversation) -> None:
        if self._evicted is not None:
            self._evicted.attach(active.conversation, self._identities.of(active), lambda: self.session)

    def start_saving(self, active: StartedConversation) -> None:
        """Save the active conversation with all its turns from now on; nothing changes if it is saved already.

        If that is impossible, a notice says why.
        """
        if self.recorder is not None:
            return
        if not self.can_save:
            self._emit(ev.Notice("Sessions are not saved in this run.", "error"))
            return
        try:
            self.open(required=True)
        except StoreError as error:
            self._emit(ev.Notice(str(error), "error"))
            return
        self.start(active)
        self._record_all()

    def _record_all(self) -> None:
        self.changed = True
        if self.recorder is not None:
            self.recorder.record_all()

    def record(self, event: ev.Event) -> None:
        """Record an event."""
        if self.recorder is not None:
            self.recorder.record(event)
        elif self._is_refused and self._started is not None and isinstance(event, ev.TurnFinished):
            self._retry(self._started)
        if self._evicted is not None and isinstance(event, ev.TurnFinished | ev.TurnPagedIn):
            # what a page evicts belongs to the turn before it, and is not undone with the next one
            if isinstance(event, ev.TurnFinished) and event.rolled_back:
                self._evicted.undone(event.stats.turn)
            else:
                self._evicted.flush()
            while self._notices:
                self._emit(ev.Notice(self._notices.pop(0), "warning"))
        if self._upkeep is not None and isinstance(event, ev.TurnFinished):
            self._upkeep.start_if_due()

    def _retry(self, active: StartedConversation) -> None:
        """Open the store, which could not be opened before, and save the conversation so far."""
        self.open(required=False)
        if self.recorder is not None:
            self._started = None
            self.recorder.start(active.conversation, self._identities.of(active))
            self._archive_evicted(active)
            self._record_all()
            if self.session is not None:
                self._emit(ev.Notice("The conversation is saved now, from its first turn on."))

    def record_status(self, sample: ev.StatusSampled, info: ev.ModelInfo) -> None:
        """Publish live figures for other processes."""
        if self.recorder is not None:
            self.recorder.record_status(sample, info)

    def record_undo(self, number: int) -> None:
        """Record that turn `number`, the newest, was undone."""
        self.changed = True
        if self._evicted is not None:
            self._evicted.undone(number)
        if self.recorder is not None:
            self.recorder.record_undo(number)

    def set_title(self, text: str) -> None:
        """Change the title of the current session; emit a notice with the title, or why it did not change."""
        if self.recorder is None or self.session is None:
            self._emit(ev.Notice("The title cannot change: this conversation is not saved.", "warning"))
            return
        try:
            self._emit(ev.Notice(f"title changed to “{self.recorder.store.rename(self.session, text)}”"))
        except (ConfigError, StoreError) as error:
            self._emit(ev.Notice(str(error), "warning"))

    def flush_and_snapshot(self, active: StartedConversation | None) -> None:
        """Flush everything to disk before switching away."""
        if self.recorder is not None:
            with self._is_saving():  # it may wait for a locked database
                self.recorder.flush()
        if active is not None:
            self.snapshot(active)

    def snapshot(self, active: StartedConversation) -> None:
        """Save the cache if it has changed since the last snapshot."""
        session = self.session
        if session is not None and self.changed and active.conversation.log.turns:
            with self._is_saving():
                self._write_snapshot(session, self._captured(session, active))

    @contextmanager
    def _is_saving(self) -> Iterator[None]:
        """Context manager: whoever ends the program waits for the end of the block."""
        self.saving.set()
        try:
            yield
        finally:
            self.saving.clear()

    def leave(self, active: StartedConversation) -> None:
        """Save everything and close the session. What writes its cache closes and unlocks it afterwards."""
        if self.recorder is None:
            return
        self.recorder.flush()
        session = self.session
        save: Callable[[], object] = _nothing
        if session is not None and self.changed and active.conversation.log.turns:
            save = self._captured(session, active)
        close = self.recorder.leave_session()
        if session is None:
            close()
            return

        def finish() -> None:
            try:
                save()
            finally:
                close()

        self._write_snapshot(session, finish)

    @property
    def is_lost(self) -> bool:
        """Whether changes of the session could not be saved, or another replica of a server owns it now."""
        recorder = self.recorder
        if recorder is None:
            return False
        if recorder.session is None:  # there is none, or it could not be created
            return recorder.has_failed
        return recorder.has_failed or not recorder.store.owns(recorder.session)

    def abandon(self) -> None:
        """Close the session without saving anything more."""
        if self.recorder is not None:
            self.recorder.abandon_session()
        self.changed = False

    def _captured(self, session: str, active: StartedConversation) -> Callable[[], object]:
        """Copy the cache; return a function that saves it, which any thread may call."""
        from streamchat.sessions.fork import captured
        from streamchat.sessions.snapshot import save

        assert self.recorder is not None
        saved = captured(session, active.conversation, self._identities.of(active))
        store = self.recorder.store
        path = store.snapshot_path(session)

        def write() -> None:
            if store.is_replaced:  # which a failing write reports
                _log.warning("no snapshot: the database of the session %s was deleted or replaced", session)
            else:
                save(path, saved)

        return write

    def _write_snapshot(self, session: str, save: Callable[[], object]) -> None:
        try:
            self._write(session, save)
            self.changed = False
        except StoreError as error:
            _log.warning("no snapshot", exc_info=True)
            self._emit(ev.Notice(f"{error}; resuming will need a prefill", "warning"))

    # --- saved sessions -----------------------------------------------------------------------------------------

    def unclean_exit_notice(self) -> str:
        """Return a notice about an unclean exit of the latest session, only once; '' otherwise."""
        if self.recorder is None:
            return ""
        from streamchat.store.lock import is_open

        store = self.recorder.store
        try:
            latest = next(iter(store.sessions(limit=1)), None)
            if latest is None or latest.opened_by is None or is_open(store.lock_folder, latest):
                return ""
            store.mark_closed(latest.id)
        except StoreError:
            _log.warning("the saved sessions could not be read", exc_info=True)
            return ""
        turns = plural(latest.turns, "turn")
        return f"The last session was not closed properly; /resume {latest.id} resumes it ({turns})."

    def claim(self, session: str) -> ClaimedSession:
        """Lock a saved session for this process.

        Raises:
            SessionError: The session does not exist, or another process has locked it.
        """
        assert self.recorder is not None
        return ClaimedSession(*self.recorder.store.lock_session(session))

    def restore(self, active: StartedConversation, claimed: ClaimedSession) -> tuple[ev.ConversationResumed, list[str]]:
        """Restore a session into `active`, a new conversation; return the event and notices to emit."""
        started = time.perf_counter()
        conversation = active.conversation
        stored, result = self.restore_into(active, claimed)
        cut = {result.cut_turn, *(turn.number for turn in stored.turns if turn.finish_reason == "cancelled")}
        event = replace(
            resumed_event(active, stored.info, {turn.number: figures_of(turn.stats) for turn in stored.turns}, cut),
            seconds=time.perf_counter() - started,
            prefilled=result.read_again,
            restored_message=result.message_back,
        )
        return event, resume_notices(stored, result, conversation.cache.cache_size)

    def describe(self, active: StartedConversation) -> ev.ConversationResumed:
        """Return the state of the active conversation as resuming it would report it, without a turn that runs."""
        if self.recorder is None or self.session is None:
            return resumed_event(active, None, {}, set())
        store = self.recorder.store
        figures = [figures_of(each) for each in store.stats(self.session)]
        return resumed_event(active, store.find(self.session), {each.turn: each for each in figures if each}, set())

    def restore_into(self, active: StartedConversation, claimed: ClaimedSession) -> tuple[StoredSession, ResumeResult]:
        """Restore a session into `active`, a new conversation; return what was stored, and the result."""
        from streamchat.sessions.resume import resume

        assert self.recorder is not None
        store, conversation, session = self.recorder.store, active.conversation, claimed.info.id
        stored = store.load(session)
        if stored.damage:
            store.repair_session(stored)
        identity = self._identities.of(active)
        result = resume(conversation, stored, identity, store.newest_snapshot(session))
        self.recorder.adopt(
            conversation,
            identity,
            claimed.lock,
            rewrite=result.rewritten,
            adopt_model=claimed.info.is_imported,
        )
        if result.cut_turn:
            conversation.close_cut_reply(result.cut_reply)
            self.recorder.record_cut_reply(result.cut_turn)
        self._archive_evicted(active)
        if result.message_back:
            self.record_undo(len(conversation.log.turns) + 1)
        if result.rewritten and self._evicted is not None:
            self._evicted.undone(0)  # they are of other tokens
        self.changed = bool(result.reason or result.cut_turn)
        return stored, result

    # --- forks --------------------------------------------------------------------------------------------------

    def marks(self, first: int, last: int) -> dict[int, CacheMark]:
        """Return the saved bookkeeping of the cache before each of these turns; {} if it cannot be read."""
        if self.recorder is None or self.session is None:
            return {}
        try:
            return self.recorder.store.marks(self.session, first, last)
        except StoreError:
            _log.warning("the saved turns could not be read", exc_info=True)
            return {}

    def fork(self, active: StartedConversation, at: int, turns: int) -> str:
        """Save the first `turns` turns as a fork of the session, which does not change, and return the id of the fork.

        Args:
            active: The conversation.
            at: The last turn that the session and the fork will share.
            turns: Number of turns of the fork.

        Raises:
            ConfigError: The conversation is not saved.
            StoreError: The fork cannot be saved.
        """
        from streamchat.sessions.fork import fork

        if self.recorder is None or self.session is None:
            raise ConfigError("this conversation is not saved, so it cannot be forked; see the setting save")
        self.recorder.flush()
        if not self.recorder.is_saved:
            raise StoreError("the latest changes of this conversation could not be saved, so nothing is forked")
        if self._evicted is not None:
            self._evicted.drain()
        return fork(self.recorder.store, self.session, active.conversation, self._identities.of(active), at, turns)

    def release_model(self) -> None:
        """Drop the reference to the previous model after another one was loaded."""
        self._started = None
        self._identities.release_model()


def _nothing() -> None:
    pass


def _write_now(session: str, save: Callable[[], object]) -> None:
    save()
