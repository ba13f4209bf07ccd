"""Writes a conversation into the store as it happens. Belongs to the engine's thread.

A message is on the disk before its reply begins; the reply follows in batches; what is written together is one
transaction, so that ids, texts and the account of the cache always fit each other. A store that fails never ends the
chat: the user is told once, and everything is tried again with the next turn.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.config.settings import Settings
from streamchat.conversation.log import TurnRecord
from streamchat.store.lock import SessionLock
from streamchat.store.records import CacheMark, SessionIdentity, StoredEviction, StoredTurn
from streamchat.store.store import Store

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.conversation import Conversation

_log = logging.getLogger(__name__)
BATCH_S = 0.5
"""Time between two writes of a running reply."""
TITLE_LENGTH = 60
LIVE_S, LIVE_IDLE_S = 1.0, 15.0
"""Time between two writes of the live figures."""


@dataclass(frozen=True)
class Identity:
    """What the model of a session is recognised by."""

    model: str
    model_name: str
    dtype: str
    fingerprint: str
    tokenizer: str


def title_of(text: str) -> str:
    """A title from a message: its first line that says something, shortened."""
    line = next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "untitled")
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


@dataclass
class _Times:
    started: float = 0.0
    finished: float | None = None
    stats: dict[str, Any] | None = None
    finish_reason: str | None = None


@dataclass
class Recorder:
    """One conversation at a time: `begin` or `adopt`, then `take` every event, then `leave`.

    Args:
        store: Open; closed by the caller.
        tell: Emits an event, such as the notice that nothing is saved any more.
    """

    store: Store
    tell: Callable[[ev.Event], None]
    session: str | None = None
    """None until the first turn: conversations in which nothing was said are not saved."""
    _conversation: Conversation | None = None
    _identity: Identity | None = None
    _settings: Settings = field(default_factory=Settings)
    _lock: SessionLock | None = None
    _evictions: list[StoredEviction] = field(default_factory=list)
    _times: dict[int, _Times] = field(default_factory=dict)
    _unwritten: int | None = None
    """Oldest turn that is not on the disk as it is now."""
    _undone_from: int | None = None
    _last_write: float = 0.0
    _failed: bool = False
    _last_live: float = 0.0
    _was_busy: bool = False

    # --- which conversation -------------------------------------------------------------------------------------

    def begin(self, conversation: Conversation, identity: Identity, settings: Settings) -> None:
        """A new conversation, which becomes a session with its first turn."""
        self.leave()
        self._conversation, self._identity, self._settings = conversation, identity, settings

    def adopt(
        self,
        conversation: Conversation,
        identity: Identity,
        settings: Settings,
        lock: SessionLock,
        *,
        rewrite: bool,
        settle: bool = False,
    ) -> None:
        """Go on with the session that `lock` is of, restored into `conversation`.

        Args:
            rewrite: Its turns have other ids than in the store.
            settle: It was imported, and this model and these settings are its own from now on.
        """
        if self.session != lock.session:
            self.leave()
        self._conversation, self._identity, self._settings = conversation, identity, settings
        self.session, self._lock = lock.session, lock
        self._unwritten = 1 if rewrite and conversation.log.turns else None
        self._guarded(lambda: self._introduce(lock.session, identity, settle))

    def _introduce(self, session: str, identity: Identity, settle: bool) -> None:
        assert self._conversation is not None
        if settle:  # before the fingerprint, which ends the question whether its model may be loaded
            settings = {**asdict(self._settings), "model": identity.model}
            self.store.set_model(session, identity.model, identity.model_name, settings)
        system = self._conversation.log.ids[: self._conversation.system_tokens]
        self.store.mark_open(session)
        # with the new ids of its turns in one transaction, where it has some
        self._write(SessionIdentity(identity.dtype, identity.fingerprint, identity.tokenizer, system))

    def leave(self) -> None:
        """The conversation is over, or another one comes; its session can be opened by others.

        `flush` before, while the conversation is still there.
        """
        if self.session is not None:
            session = self.session
            self._guarded(lambda: self.store.mark_closed(session))
        if self._lock is not None:
            self._lock.release()
        self.session = self._lock = self._conversation = None
        self._evictions, self._times = [], {}
        self._unwritten = self._undone_from = None

    def flush(self) -> None:
        """Write what a failure kept from being written."""
        pending = self._unwritten is not None or self._undone_from is not None
        if self._conversation is not None and self.session is not None and pending:
            self._guarded(self._write)

    # --- what happens -------------------------------------------------------------------------------------------

    def record(self, event: ev.Event) -> None:
        """Record what `event` says, where it says something."""
        if self._conversation is None:
            return
        match event:
            case ev.TurnStarted(turn=turn):
                self._times[turn] = _Times(time.time())
                self._changed(turn)
                self._guarded(self._write)
            case ev.TextDelta() if time.monotonic() - self._last_write >= BATCH_S:
                self._changed(event.turn)
                self._guarded(self._write)
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
                self._changed(stats.turn)
                self._guarded(self._write)
            case ev.TurnPinned():
                self._guarded(self._write)
            case ev.SettingChanged(name=name, value=value):
                self._guarded(lambda: self._write_change(name, value))
            case _:
                pass

    def record_status(self, event: ev.StatusSampled, info: ev.ModelInfo | None) -> None:
        """Let other processes see how things stand: once a second while a reply is written, else now and then."""
        now = time.monotonic()
        due = LIVE_S if event.busy or self._was_busy else LIVE_IDLE_S
        if self.session is None or now - self._last_live < due:
            return
        self._last_live, self._was_busy = now, event.busy
        session, sample = self.session, asdict(event) | {"info": None if info is None else asdict(info)}
        try:
            self.store.write_live(session, sample)
        except StoreError:  # what is said matters more, and tells of a store that fails
            _log.warning("the live figures could not be written", exc_info=True)

    def closed(self, number: int) -> None:
        """Turn `number`, whose reply was cut off when a process was killed, is whole again."""
        self._times[number] = _Times(time.time(), time.time(), None, "cancelled")
        self._changed(number)
        self._guarded(self._write)

    def record_undo(self, number: int) -> None:
        """Turn `number` and later ones were taken back."""
        self._undone_from = number if self._undone_from is None else min(number, self._undone_from)
        self._evictions = [eviction for eviction in self._evictions if eviction.turn < number]
        self._times = {turn: times for turn, times in self._times.items() if turn < number}
        if self._unwritten is not None and self._unwritten >= number:
            self._unwritten = None
        self._guarded(self._write)

    # --- writing ------------------------------------------------------------------------------------------------

    def _changed(self, turn: int) -> None:
        self._unwritten = turn if self._unwritten is None else min(turn, self._unwritten)

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except StoreError as error:
            _log.warning("saving failed: %s", error, exc_info=True)
            if not self._failed:
                self._failed = True
                self.tell(ev.SavingChanged(False))
                self.tell(ev.Notice(f"This conversation is not saved at the moment: {error}", "warning"))
            return
        if self._failed and self.session is not None:
            self._failed = False
            self.tell(ev.SavingChanged(True))
            self.tell(ev.Notice("The conversation is saved again, with all that was said meanwhile."))

    def _write(self, described: SessionIdentity | None = None) -> None:
        conversation, identity = self._conversation, self._identity
        assert conversation is not None
        assert identity is not None
        self._last_write = time.monotonic()
        log = conversation.log
        if self.session is None:
            if not log.turns:
                return
            self.session = self._create(conversation, identity)
            self._unwritten = 1
        first = self._unwritten
        turns = [] if first is None else [self._stored(turn) for turn in log.turns[first - 1 :]]
        self.store.write(
            self.session,
            turns=turns,
            cache=conversation.rollback.mark(),
            evictions=self._evictions,
            undone_from=self._undone_from,
            identity=described,
        )
        self._evictions, self._undone_from = [], None
        running = bool(log.turns) and log.turns[-1].end is None
        self._unwritten = log.turns[-1].number if running else None
        for number in [number for number in self._times if number < (self._unwritten or len(log.turns))]:
            del self._times[number]

    def _create(self, conversation: Conversation, identity: Identity) -> str:
        session = self.store.create(
            title_of(conversation.log.turns[0].text),
            model=identity.model,
            model_name=identity.model_name,
            dtype=identity.dtype,
            fingerprint=identity.fingerprint,
            tokenizer=identity.tokenizer,
            settings=asdict(self._settings),
            system_ids=conversation.log.ids[: conversation.system_tokens],
        )
        self._lock = SessionLock(self.store.lock_folder, session)
        self.store.mark_open(session)
        self.tell(ev.SessionOpened(session))
        return session

    def _write_change(self, name: str, value: Any) -> None:
        self._settings = Settings(**(asdict(self._settings) | {name: value}))
        if self.session is not None:
            self.store.change(self.session, name, value, asdict(self._settings))

    def _stored(self, turn: TurnRecord) -> StoredTurn:
        assert self._conversation is not None
        log = self._conversation.log
        times = self._times.get(turn.number, _Times(time.time()))
        stop = len(log) if turn.end is None else turn.end
        reply = turn.reply
        if turn.end is None:
            reply = self._conversation.shown
        return StoredTurn(
            number=turn.number,
            text=turn.text,
            reply=reply,
            start=turn.start,
            message_start=turn.message_start,
            reply_start=turn.start if turn.reply_start is None else turn.reply_start,
            ids=array("i", log.ids[turn.start : stop]),
            before=CacheMark() if turn.before is None else turn.before.cache,
            state="running" if turn.end is None else "done",
            started=times.started,
            finished=times.finished,
            stats=times.stats,
            finish_reason=times.finish_reason,
        )
