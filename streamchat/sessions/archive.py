"""The running conversation among the saved ones: recorded, snapshotted, left and had back. On the engine's thread."""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.errors import StoreError
from streamchat.base.formatting import plural
from streamchat.base.saved_figures import InvalidFiguresError, load_figures
from streamchat.config.settings import Settings
from streamchat.sessions.settings import lasting_name
from streamchat.sessions.upkeep import Upkeep

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.conversation import Conversation
    from streamchat.conversation.log import TurnRecord
    from streamchat.sessions.recorder import Identity, Recorder
    from streamchat.sessions.resume import Resumed
    from streamchat.store.lock import SessionLock
    from streamchat.store.records import SessionInfo
    from streamchat.store.store import Store

_log = logging.getLogger(__name__)
OpenStore = Callable[[], "Store"]


@dataclass(frozen=True)
class Held:
    """A conversation on a model, with the settings in force."""

    conversation: Conversation
    info: ev.ModelInfo
    settings: Settings


@dataclass(frozen=True)
class Opening:
    """A saved conversation that this process has for itself."""

    info: SessionInfo
    lock: SessionLock


class Archive:
    """Does nothing where nothing is to be saved.

    Args:
        open_store: Opens the store; None where nothing is to be saved.
        tell: Emits an event.
    """

    def __init__(self, open_store: OpenStore | None, tell: Callable[[ev.Event], None]) -> None:
        self._open_store, self._tell = open_store, tell
        self._store: Store | None = None
        self._upkeep: Upkeep | None = None
        self._identified: tuple[Any, tuple[object, ...], Identity] | None = None
        self.recorder: Recorder | None = None
        """None where nothing is saved."""
        self.saving = threading.Event()
        """Set while the cache is written to the disk: leaving waits for it."""
        self.changed = False
        """The cache is not what the latest snapshot has."""

    @property
    def session(self) -> str | None:
        """Id of the running conversation; None before its first turn."""
        return None if self.recorder is None else self.recorder.session

    def open(self, *, required: bool) -> None:
        """Open the store. Where that fails the chat goes on unsaved, unless it is `required`.

        Raises:
            StoreError: It cannot be opened.
        """
        if self._open_store is None:
            return
        from streamchat.sessions.recorder import Recorder

        try:
            self._store = self._open_store()
        except StoreError as error:
            if required:
                raise
            _log.warning("nothing will be saved", exc_info=True)
            self._tell(ev.Notice(f"This conversation is not saved: {error}", "warning"))
            return
        self.recorder = Recorder(self._store, self._tell)
        if self._store.is_the_users_own:
            self._upkeep = Upkeep(self._store, self._tell)
            self._upkeep.consider()

    def close(self) -> None:
        """The conversation was left; let go of the store."""
        if self.recorder is not None:
            self.recorder.leave()
        if self._upkeep is not None:
            self._upkeep.stop()
        if self._store is not None:
            self._store.close()

    # --- the running conversation -------------------------------------------------------------------------------

    def begin(self, held: Held) -> None:
        """A new conversation."""
        self.changed = False
        if self.recorder is not None:
            settings = replace(held.settings, model=lasting_name(held.settings.model))
            self.recorder.begin(held.conversation, self._identify(held), settings)

    def take(self, event: ev.Event) -> None:
        """Record what happened."""
        if self.recorder is not None:
            self.recorder.take(event)
        if self._upkeep is not None and isinstance(event, ev.TurnFinished):
            self._upkeep.consider()

    def sampled(self, sample: ev.StatusSampled, info: ev.ModelInfo | None) -> None:
        """The figures of the moment, for other processes."""
        if self.recorder is not None:
            self.recorder.sampled(sample, info)

    def undone(self, number: int) -> None:
        """Turn `number`, the newest, was taken back."""
        self.changed = True
        if self.recorder is not None:
            self.recorder.undone(number)

    def leave_in_order(self, held: Held | None) -> None:
        """The conversation may be left now: have all of it on the disk."""
        if self.recorder is not None:
            self.recorder.flush()
        if held is not None:
            self.snapshot(held)

    def snapshot(self, held: Held) -> None:
        """Save its cache, where it has changed since the last time."""
        conversation, session = held.conversation, self.session
        if session is None or not self.changed or not conversation.log.turns:
            return
        from streamchat.cache import checkpoint
        from streamchat.sessions.snapshot import Snapshot, save

        assert self._store is not None
        self.saving.set()
        try:
            identity = self._identify(held)
            taken = checkpoint.take(conversation.cache)
            ids = array("i", conversation.log.take(taken.runs))
            settings = asdict(held.settings)
            saved = Snapshot(session, taken, ids, conversation.draw, identity.fingerprint, identity.dtype, settings)
            save(self._store.snapshot_path(session), saved)
            self.changed = False
        except StoreError as error:
            _log.warning("no snapshot", exc_info=True)
            self._tell(ev.Notice(f"{error}; resuming will read the cache again", "warning"))
        finally:
            self.saving.clear()

    # --- saved ones ---------------------------------------------------------------------------------------------

    def killed(self) -> str:
        """A sentence about the latest conversation where it ended with its process, once; '' otherwise."""
        if self._store is None:
            return ""
        from streamchat.store.lock import is_open

        try:
            latest = next(iter(self._store.sessions(limit=1)), None)
            if latest is None or latest.opened_by is None or is_open(self._store.lock_folder, latest):
                return ""
            self._store.mark_closed(latest.id)
        except StoreError:
            _log.warning("the saved conversations could not be looked at", exc_info=True)
            return ""
        turns = plural(latest.turns, "turn")
        return f"The last conversation ended without being closed; /resume {latest.id} goes on with it ({turns})."

    def claim(self, session: str) -> Opening:
        """Have a saved conversation for this process.

        Raises:
            SessionError: There is none, or another process has it.
        """
        from streamchat.store.lock import SessionLock

        assert self._store is not None
        info = self._store.find(session)
        return Opening(info, SessionLock(self._store.lock_folder, info.id, info.opened_by))

    def restore(self, held: Held, opening: Opening) -> tuple[ev.ConversationResumed, list[str]]:
        """Have it back in `held`, a fresh conversation; returns what to tell."""
        from streamchat.sessions.resume import resume

        assert self._store is not None
        assert self.recorder is not None
        started = time.perf_counter()
        conversation, session = held.conversation, opening.info.id
        stored = self._store.load(session)
        if stored.damage:
            self._store.mend(stored)
        identity = self._identify(held)
        how = resume(conversation, stored, identity, self._store.snapshot_path(session))
        self.recorder.adopt(
            conversation,
            identity,
            held.settings,
            opening.lock,
            rewrite=how.rewritten,
            settle=opening.info.is_imported,
        )
        if how.cut_turn:
            conversation.close_cut_reply(how.cut_reply)
            self.recorder.closed(how.cut_turn)
        if how.message_back:
            self.recorder.undone(len(conversation.log.turns) + 1)
        self.changed = bool(how.reason or how.cut_turn)
        stats = {turn.number: _figures(turn.stats) for turn in stored.turns}
        turns = tuple(_saved_turn(conversation, turn, stats[turn.number]) for turn in conversation.log.turns)
        event = ev.ConversationResumed(
            session,
            stored.info.title,
            turns,
            conversation.state(),
            held.info,
            held.settings.system_prompt,
            time.perf_counter() - started,
            how.read_again,
            how.message_back,
        )
        return event, [*_damage(stored.damage), *_sentences(how)]

    def _identify(self, held: Held) -> Identity:
        """Of the loaded model; some 50 ms, once a model and format."""
        from streamchat.models.fingerprint import model_fingerprint, tokenizer_fingerprint
        from streamchat.sessions.recorder import Identity

        conversation = held.conversation
        parts = conversation.encoder.format.identity
        if self._identified is None or self._identified[:2] != (conversation.model, parts):
            self._identified = None  # the old model may go
            identity = Identity(
                lasting_name(held.settings.model),
                held.info.name,
                held.info.precision,
                model_fingerprint(conversation.model),
                tokenizer_fingerprint(conversation.tokenizer, parts),
            )
            self._identified = (conversation.model, parts, identity)
        return self._identified[2]

    def forget_model(self) -> None:
        """Another model was loaded: nothing here holds the one before."""
        self._identified = None


def _figures(stats: Mapping[str, Any] | None) -> ev.TurnStats | None:
    """The figures of a turn; None where they are damaged, or of another version."""
    with suppress(InvalidFiguresError):
        return None if stats is None else load_figures(ev.TurnStats, stats)
    return None


def _saved_turn(conversation: Conversation, turn: TurnRecord, stats: ev.TurnStats | None) -> ev.SavedTurn:
    if stats is not None:
        return ev.SavedTurn(
            turn.number,
            turn.text,
            turn.reply,
            stats.prompt_tokens,
            stats.new_tokens,
            stats.ttft_s,
            stats.decode_tps,
            stats.finish_reason,
        )
    # cut off by a crash, or imported: counted from the ids
    opening, close = len(conversation.encoder.reply_opening()), len(conversation.encoder.close())
    reply_first = turn.first if turn.reply_first is None else turn.reply_first
    stop = reply_first if turn.stop is None else turn.stop
    read, written = reply_first - turn.first + opening, max(0, stop - reply_first - opening - close)
    return ev.SavedTurn(turn.number, turn.text, turn.reply, read, written, finish_reason="cancelled")


def _damage(parts: tuple[str, ...]) -> list[str]:
    if not parts:
        return []
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return [f"Parts of this conversation are damaged in the database and were left out: {', '.join(parts[:3])}{more}."]


def _sentences(how: Resumed) -> list[str]:
    """What the user should know, a sentence each."""
    from streamchat.conversation.fitting import unpinned_sentence

    said = []
    if how.read_again:
        said.append(f"{how.read_again:,} tokens were read again in {how.seconds:.1f} s, because {how.reason}.")
    if how.cut_turn:
        said.append(
            f"streamchat ended while the reply of turn {how.cut_turn} was written; what was saved of it is kept."
        )
    if how.message_back:
        said.append("streamchat ended before the last message was answered; it is not part of the conversation.")
    if how.unpinned:
        said.append(unpinned_sentence(how.unpinned, how.cache_size))
    return said
