"""Writes the active conversation to the store while it runs. Owned by the engine's thread.

A message is on the disk before its reply starts; the reply follows in batches. Each write is one transaction, so that
ids, texts and cache state always agree. If the store fails, the chat continues: the user gets one notice, and the
writes are retried with the next turn.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.conversation.log import TurnRecord
from streamchat.models.adapters import portable_setting
from streamchat.store.lock import SessionLock
from streamchat.store.records import CacheMark, ModelIdentity, StoredEviction, StoredTurn
from streamchat.store.store import Store

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.conversation import Conversation

_log = logging.getLogger(__name__)
BATCH_S = 0.5
"""Time between two writes of a running reply."""
TITLE_LENGTH = 60
LIVE_S, LIVE_IDLE_S = 1.0, 15.0
"""Time between two writes of the live figures, while a reply is generated and otherwise."""


def title_of(text: str) -> str:
    """Return a title for a message: its first line with text, shortened."""
    line = next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "untitled")
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


@dataclass
class _Times:
    started: float = 0.0
    finished: float | None = None
    stats: dict[str, Any] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class _Adoption:
    """The model that a resumed session continues with."""

    identity: ModelIdentity
    adopt_model: bool


@dataclass
class Recorder:
    """Records one conversation at a time: `start` or `adopt`, then `record` every event, then `close_session`.

    Args:
        store: An open store; closed by the caller.
        emit: Emits an event, for example the notice that saving fails.
    """

    store: Store
    emit: Callable[[ev.Event], None]
    session: str | None = None
    """None until the first turn: empty conversations are not saved."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Stored with the settings of the session; a server finds its sessions by them."""
    _conversation: Conversation | None = None
    _identity: ModelIdentity | None = None
    _lock: SessionLock | None = None
    _evictions: list[StoredEviction] = field(default_factory=list)
    _times: dict[int, _Times] = field(default_factory=dict)
    _unwritten: int | None = None
    """Oldest turn with unsaved changes."""
    _undone_from: int | None = None
    _adoption: _Adoption | None = None
    """What a resumed session is to be told before anything else is written."""
    _changes: list[tuple[str, Any]] = field(default_factory=list)
    """Changed settings that are not written yet."""
    _last_write: float = 0.0
    _failed: bool = False
    _has_lost: bool = False
    """Whether a session was closed whose latest changes could not be written."""
    _last_live: float = 0.0
    _was_busy: bool = False

    # --- which conversation -------------------------------------------------------------------------------------

    def start(self, conversation: Conversation, identity: ModelIdentity) -> None:
        """Start recording a new conversation, which becomes a session with its first turn."""
        self.close_session()
        self._conversation, self._identity = conversation, identity

    def adopt(
        self,
        conversation: Conversation,
        identity: ModelIdentity,
        lock: SessionLock,
        *,
        rewrite: bool,
        adopt_model: bool = False,
    ) -> None:
        """Continue the session of `lock`, which was restored into `conversation`.

        Args:
            rewrite: Whether its turns have other ids than in the store.
            adopt_model: Whether to store this model and the current settings, for a session that was imported.
        """
        if self.session != lock.session:
            self.close_session()
        self._conversation, self._identity = conversation, identity
        self.session, self._lock = lock.session, lock
        self._unwritten = 1 if rewrite and conversation.log.turns else None
        self._adoption = _Adoption(identity, adopt_model)
        self._try_write(self._write)

    def close_session(self) -> None:
        """Close and unlock the session, so that other processes can open it.

        Call `flush` first, while the conversation still exists.
        """
        if self.session is not None:
            session = self.session
            if self._failed and self._is_pending:
                self._has_lost = True
                self.emit(ev.Notice(f"The latest changes of the session {session} could not be saved.", "warning"))
            self._succeeds(lambda: self.store.mark_closed(session))  # which saves no changes
        if self._lock is not None:
            self._lock.release()
        self._forget_session()

    @property
    def has_failed(self) -> bool:
        """Whether the latest write failed."""
        return self._failed

    def abandon_session(self) -> None:
        """Unlock the session, and forget what was not written."""
        if self._lock is not None:
            self._lock.release()
        self._failed = self._has_lost = False
        self._forget_session()

    def leave_session(self) -> Callable[[], None]:
        """Like `close_session`, but return the function that closes and unlocks it. Any thread may call it, once."""
        session, lock, store = self.session, self._lock, self.store
        self._forget_session()

        def close() -> None:
            try:
                if session is not None and not store.is_replaced:  # a deleted one is not created again
                    with Store(store.path) as opened:  # that of the recorder may be closed by then
                        opened.mark_closed(session)
            except StoreError:
                _log.warning("the session %s could not be marked as closed", session, exc_info=True)
            finally:
                if lock is not None:
                    lock.release()

        return close

    def _forget_session(self) -> None:
        self.session = self._lock = self._conversation = None
        self._evictions, self._times = [], {}
        self._unwritten = self._undone_from = self._adoption = None
        self._changes = []

    @property
    def _is_pending(self) -> bool:
        """Whether a write failed and was not done again yet."""
        return any(each is not None for each in (self._unwritten, self._undone_from, self._adoption)) or bool(
            self._changes
        )

    @property
    def is_saved(self) -> bool:
        """Whether everything that was recorded so far is in the store."""
        return self.session is not None and not self._is_pending

    def flush(self) -> None:
        """Retry writes that failed earlier, and wait for a database that another program keeps locked."""
        if self._conversation is not None and self.session is not None and self._is_pending:
            self.store.be_patient()
            self._try_write(self._write)

    # --- events -------------------------------------------------------------------------------------------------

    def record(self, event: ev.Event) -> None:
        """Record `event` if it changes the session."""
        if self._conversation is None:
            return
        match event:
            case ev.TurnStarted(turn=turn):
                self._times[turn] = _Times(time.time())
                self._write_from(turn)
            case ev.TextDelta() if time.monotonic() - self._last_write >= BATCH_S:
                self._write_from(event.turn)
            case ev.TokensEvicted() if self._conversation.log.turns:
                turn = self._conversation.log.turns[-1].number
                self._evictions.append(
                    StoredEviction(
                        turn, time.time(), event.trigger, event.runs, event.cache_len_before, event.cache_len_after
                    )
                )
            case ev.TurnFinished(rolled_back=True):
                self.record_undo(event.stats.turn)
            case ev.TurnFinished(stats=stats):
                times = self._times.setdefault(stats.turn, _Times(time.time()))
                times.finished, times.stats, times.finish_reason = time.time(), stats.as_dict(), stats.finish_reason
                self._write_from(stats.turn)
            case ev.TurnPinned() | ev.TurnPagedIn():
                self._try_write(self._write)
            case ev.SettingChanged(name=name, value=value):
                self._changes.append((name, value))
                self._try_write(self._write_changes)
            case _:
                pass

    def record_all(self) -> None:
        """Record all turns of a conversation that was not saved before."""
        if self._conversation is not None and self._conversation.log.turns:
            self._write_from(1)

    def record_status(self, event: ev.StatusSampled, info: ev.ModelInfo) -> None:
        """Publish live figures for `streamchat monitor`: once a second while a reply is generated, else less often."""
        now = time.monotonic()
        due = LIVE_S if event.busy or self._was_busy else LIVE_IDLE_S
        if self.session is None or now - self._last_live < due:
            return
        self._last_live, self._was_busy = now, event.busy
        session, sample = self.session, asdict(event) | {"info": asdict(info)}
        try:
            self.store.write_live(session, sample)
        except StoreError:  # writing the turns reports a failing store
            _log.warning("the live figures could not be written", exc_info=True)

    def started_at(self, number: int) -> float:
        """Return when turn `number`, the running or newest one, started."""
        return self._times[number].started

    def record_cut_reply(self, number: int) -> None:
        """Record that turn `number`, whose reply was cut off when a process was killed, is now closed."""
        self._times[number] = _Times(time.time(), time.time(), None, "cancelled")
        self._write_from(number)

    def record_undo(self, number: int) -> None:
        """Record that turn `number` and all later ones were undone."""
        self._undone_from = number if self._undone_from is None else min(number, self._undone_from)
        self._evictions = [eviction for eviction in self._evictions if eviction.turn < number]
        self._times = {turn: times for turn, times in self._times.items() if turn < number}
        if self._unwritten is not None and self._unwritten >= number:
            self._unwritten = None
        self._try_write(self._write)

    # --- writing ------------------------------------------------------------------------------------------------

    def _write_from(self, turn: int) -> None:
        self._unwritten = turn if self._unwritten is None else min(turn, self._unwritten)
        self._try_write(self._write)

    def _try_write(self, write: Callable[[], object]) -> None:
        if self._succeeds(write) and self._failed and self.session is not None:
            also = "" if self._has_lost else ", including everything since the failure"
            self._failed = self._has_lost = False
            self.emit(ev.SavingChanged(True))
            self.emit(ev.Notice(f"The conversation is saved again{also}."))

    def _succeeds(self, write: Callable[[], object]) -> bool:
        """Write; if the store fails, report the first failure and return False."""
        try:
            write()
        except StoreError as error:
            _log.warning("saving failed: %s", error, exc_info=True)
            if not self._failed:
                self._failed = True
                self.emit(ev.SavingChanged(False))
                self.emit(ev.Notice(f"This conversation is currently not saved: {error}", "warning"))
            return False
        return True

    def _write(self) -> None:
        conversation, identity = self._conversation, self._identity
        assert conversation is not None
        assert identity is not None
        self._last_write = time.monotonic()
        log = conversation.log
        if self.session is None:
            if not log.turns:
                return
            self._create(conversation, identity)
            self._unwritten = 1
        session = self.session
        assert session is not None
        adoption = self._adoption
        if adoption is not None and adoption.adopt_model:
            # before the fingerprint, after which the session no longer counts as imported
            self.store.set_model(session, adoption.identity, self._settings())
        first = self._unwritten
        turns = [] if first is None else [self._stored(turn) for turn in log.turns[first - 1 :]]
        self.store.write(
            session,
            turns=turns,
            cache=conversation.rollback.mark(),
            evictions=self._evictions,
            undone_from=self._undone_from,
            # in one transaction with the new ids of its turns
            identity=None if adoption is None else adoption.identity,
            system_ids=log.ids[: conversation.system_tokens],
            is_opened=adoption is not None,
        )
        self._evictions, self._undone_from, self._adoption = [], None, None
        running = bool(log.turns) and log.turns[-1].end is None
        self._unwritten = log.turns[-1].number if running else None
        for number in [number for number in self._times if number < (self._unwritten or len(log.turns))]:
            del self._times[number]
        self._write_changes()

    def _create(self, conversation: Conversation, identity: ModelIdentity) -> None:
        self._lock = self.store.create_locked(
            title_of(conversation.log.turns[0].text),
            identity,
            self._settings(),
            conversation.log.ids[: conversation.system_tokens],
        )
        self.session, self._changes = self._lock.session, []  # it has the current settings
        self.emit(ev.SessionOpened(self.session))

    def _write_changes(self) -> None:
        """Write the changed settings; those of an empty conversation are written with its first turn."""
        if self.session is not None and self._changes:
            self.store.change(self.session, self._changes, self._settings())
        self._changes = []

    def _settings(self) -> dict[str, Any]:
        """Return the current settings, with names of model and adapters that are valid in any folder."""
        assert self._conversation is not None
        assert self._identity is not None
        settings = self._conversation.settings
        portable = {"model": self._identity.model, "adapter": portable_setting(settings.adapter)}
        return asdict(settings) | portable | dict(self.labels)

    def _stored(self, turn: TurnRecord) -> StoredTurn:
        assert self._conversation is not None
        log = self._conversation.log
        times = self._times.get(turn.number, _Times(time.time()))
        stop = len(log) if turn.end is None else turn.end
        return StoredTurn(
            number=turn.number,
            text=turn.text,
            reply=self._conversation.shown if turn.end is None else turn.reply,
            start=turn.start,
            message_start=turn.message_start,
            reply_start=turn.start if turn.reply_start is None else turn.reply_start,
            ids=array("i", log.ids[turn.start : stop]),
            before=CacheMark() if turn.before is None else turn.before.cache,
            state="running" if turn.end is None else "done",
            **vars(times),
        )
