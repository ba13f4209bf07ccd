"""What the engine's thread does: it owns model, cache, conversation and the record of it, and carries out requests.

Nothing here may be called from another thread; `Engine` is the way in.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.chat import events as ev
from streamchat.chat.assemble import Assembled, Load, Progress, assemble
from streamchat.chat.sessions import resumed_configuration
from streamchat.config import Configuration
from streamchat.errors import ConfigError, StoreError, StreamchatError, TurnError
from streamchat.settings import Settings
from streamchat.telemetry.memory import device_memory, free_unused, process_rss

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.chat.conversation import Conversation, TurnOutcome
    from streamchat.chat.log import TurnRecord
    from streamchat.chat.recorder import Identity, Recorder
    from streamchat.chat.resume import Resumed
    from streamchat.models.load import LoadedModel
    from streamchat.store.records import StoredSession
    from streamchat.store.store import Store

_log = logging.getLogger(__name__)
STATUS_INTERVAL_S = 0.5
OpenStore = Callable[[], "Store"]


class Owner:
    """Model, conversation and record.

    Args:
        configuration: Settings, and where they came from for messages.
        load: Gets the model.
        emit: Tells the faces.
        progress: Tells the progress of loading; may raise to end it.
        open_store: Opens the store; None where nothing is to be saved.
    """

    def __init__(
        self,
        configuration: Configuration,
        load: Load,
        emit: Callable[[ev.Event], None],
        progress: Progress,
        open_store: OpenStore | None,
    ) -> None:
        self._configuration, self._load, self._tell, self._progress = configuration, load, emit, progress
        self.settings = configuration.settings
        self.conversation: Conversation | None = None
        self.saving = threading.Event()
        """Set while the cache is written to the disk: leaving waits for it."""
        self._open_store = open_store
        self._loaded: LoadedModel | None = None
        self._info: ev.ModelInfo | None = None
        self._device = "cpu"
        self._recorder: Recorder | None = None
        self._store: Store | None = None
        self._identified: tuple[Any, tuple[object, ...], Identity] | None = None
        self._busy = False
        self._last_status = 0.0
        self._unsaved_turns = False

    # --- beginning and ending ----------------------------------------------------------------------------------

    def begin(self, session: str | None) -> None:
        """Load the model and hold a new conversation, or the saved one `session`.

        Raises:
            StreamchatError: There is no conversation to be had.
        """
        self._open_record(required=session is not None)
        if session is None:
            self._prepare(self._configuration)
            self._record_anew()
            self._tell_of_the_killed()
        else:
            self._open_session(session)

    def _tell_of_the_killed(self) -> None:
        """Say once that the latest conversation ended with its process, and how to have it back."""
        if self._store is None:
            return
        from streamchat.store.lock import is_locked

        try:
            latest = self._store.sessions(limit=1)
            if latest and latest[0].opened_by and not is_locked(self._store.lock_folder, latest[0].id):
                self._store.mark_closed(latest[0].id)
                self.emit(
                    ev.Notice(
                        f"The last conversation ended without being closed; /resume {latest[0].id} goes on with it "
                        f"({latest[0].turns} turn{'s' if latest[0].turns != 1 else ''})."
                    )
                )
        except StoreError:
            _log.warning("the saved conversations could not be looked at", exc_info=True)

    def _open_record(self, *, required: bool) -> None:
        if self._open_store is None:
            return
        from streamchat.chat.recorder import Recorder

        try:
            self._store = self._open_store()
        except StoreError as error:
            if required:
                raise
            _log.warning("nothing will be saved", exc_info=True)
            self.emit(ev.Notice(f"This conversation is not saved: {error}", "warning"))
            return
        self._recorder = Recorder(self._store, self._tell)

    def end(self) -> None:
        """Save what can be saved and let go of everything."""
        try:
            self._leave_in_order()
            if self._recorder is not None:
                self._recorder.leave()
        except Exception:
            _log.exception("saving at the end failed")
        if self.conversation is not None:
            self.conversation.close()
        if self._store is not None:
            self._store.close()

    # --- the model ---------------------------------------------------------------------------------------------

    def _prepare(self, configuration: Configuration, *, reuse: bool = False) -> None:
        """Have a conversation on the model of `configuration`; with `reuse`, on the loaded one where it is that."""
        started = time.perf_counter()
        self._progress("Starting", 0, 0, "")
        same = reuse and self._loaded is not None and _same_model(configuration.settings, self.settings)
        previous = self.conversation
        loaded = self._loaded if same and self._loaded is not None else self._load(configuration, self._progress)
        if same and previous is not None:
            previous.close()  # one hook a model
        try:
            assembled = assemble(configuration, loaded, self.emit, self._progress)
        except BaseException:
            if same and previous is not None:
                previous.reopen()
            raise
        self._take(configuration, loaded, assembled)
        if previous is not None:
            previous.close()
            previous = None
            free_unused()
            self.emit(ev.ConversationCleared(self.settings.system_prompt, assembled.info.pinned_tokens))
        self.emit(ev.ModelReady(assembled.info, time.perf_counter() - started))
        for text in assembled.notes:
            self.emit(ev.Notice(text))

    def _take(self, configuration: Configuration, loaded: LoadedModel, assembled: Assembled) -> None:
        self._loaded, self._info, self.conversation = loaded, assembled.info, assembled.conversation
        self._configuration, self.settings = configuration, configuration.settings
        self._device = assembled.device
        if self._identified is not None and self._identified[0] is not loaded.model:
            self._identified = None
        self._unsaved_turns = False

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it; the old one stays where that fails."""
        settings = replace(self.settings, model=name)
        origins = {**self._configuration.origins, "model": "/model"}
        self._leave_in_order()
        try:
            self._prepare(replace(self._configuration, settings=settings, origins=origins))
        except StreamchatError as error:
            _log.warning("switching to %s failed", name, exc_info=True)
            self.emit(ev.Notice(f"{error}; the conversation goes on with the model it has", "error"))
        except Exception as error:
            _log.exception("switching to %s failed", name)
            first = (str(error).splitlines() or [""])[0]
            text = f"{name} could not be loaded ({type(error).__name__}: {first}); the conversation goes on"
            self.emit(ev.Notice(text, "error"))
        else:
            self._record_anew()

    # --- saved conversations -----------------------------------------------------------------------------------

    def open_session(self, session: str) -> None:
        """Leave the running conversation, which stays saved, for another one."""
        if self._recorder is None:
            self.emit(ev.Notice("Conversations are not saved in this run, so none can be opened.", "error"))
            return
        if session == self._recorder.session:
            self.emit(ev.Notice(f"The conversation {session} is the one that is open."))
            return
        self._leave_in_order()
        previous = self.conversation
        try:
            self._open_session(session)
        except Exception as error:
            _log.warning("opening %s failed", session, exc_info=True)
            what = str(error)
            if not isinstance(error, StreamchatError):
                what = f"{session} could not be opened ({type(error).__name__}: {(what.splitlines() or [''])[0]})"
            if self.conversation is previous:
                what += "; the conversation that is open goes on"
            else:
                what += "; it stays saved, and a new conversation was begun"
                self._record_anew()
            self.emit(ev.Notice(what, "error"))

    def _open_session(self, session: str) -> None:
        from streamchat.chat.resume import resume
        from streamchat.store.lock import SessionLock

        assert self._store is not None
        assert self._recorder is not None
        stored_info = self._store.find(session)
        lock = SessionLock(self._store.lock_folder, stored_info.id, stored_info.opened_by)
        try:
            self._prepare(resumed_configuration(self._configuration, stored_info), reuse=True)
            started = time.perf_counter()
            stored = self._store.load(stored_info.id)
            identity = self._identify()
            assert self.conversation is not None
            how = resume(self.conversation, stored, identity, self._store.snapshot_path(stored_info.id))
        except BaseException:
            lock.release()
            raise
        self._recorder.adopt(self.conversation, identity, self.settings, lock, rewrite=how.rewritten)
        if how.cut_turn:
            self.conversation.close_cut_reply(how.cut_reply)
            self._recorder.closed(how.cut_turn)
        if how.message_back:
            self._recorder.undone(len(self.conversation.log.turns) + 1)
        self._unsaved_turns = bool(how.reason or how.cut_turn)
        self.emit(ev.SessionOpened(stored_info.id))
        self.emit(self._resumed(stored, how, time.perf_counter() - started))
        for text in _sentences(how):
            self.emit(ev.Notice(text))

    def _resumed(self, stored: StoredSession, how: Resumed, seconds: float) -> ev.ConversationResumed:
        assert self.conversation is not None
        assert self._info is not None
        stats = {turn.number: turn.stats for turn in stored.turns}
        turns = tuple(self._saved_turn(turn, stats[turn.number]) for turn in self.conversation.log.turns)
        return ev.ConversationResumed(
            stored.info.id,
            stored.info.title,
            turns,
            self.conversation.state(),
            self._info,
            self.settings.system_prompt,
            seconds,
            how.read_again,
            how.message_back,
        )

    def _saved_turn(self, turn: TurnRecord, stats: Mapping[str, Any] | None) -> ev.SavedTurn:
        if stats is not None:
            return ev.SavedTurn(
                turn.number,
                turn.text,
                turn.reply,
                stats.get("prompt_tokens", 0),
                stats.get("new_tokens", 0),
                stats.get("ttft_s"),
                stats.get("decode_tps"),
                stats.get("finish_reason", "stop"),
            )
        # cut off by a crash, or imported: counted from the ids
        assert self.conversation is not None
        encoder = self.conversation.encoder
        opening, close = len(encoder.reply_opening()), len(encoder.close())
        reply_first = turn.first if turn.reply_first is None else turn.reply_first
        stop = reply_first if turn.stop is None else turn.stop
        read, written = reply_first - turn.first + opening, max(0, stop - reply_first - opening - close)
        return ev.SavedTurn(turn.number, turn.text, turn.reply, read, written, finish_reason="cancelled")

    def _identify(self) -> Identity:
        """Of the loaded model; some 50 ms, once a model and format."""
        from streamchat.chat.recorder import Identity
        from streamchat.models.fingerprint import model_fingerprint, tokenizer_fingerprint

        conversation, info = self.conversation, self._info
        assert conversation is not None
        assert info is not None
        turns = conversation.encoder.format
        parts = (turns.first_user_open, turns.user_open, turns.generation, turns.assistant_close, turns.strips)
        if self._identified is None or self._identified[:2] != (conversation.model, parts):
            identity = Identity(
                _lasting_name(self.settings.model),
                info.name,
                info.dtype,
                model_fingerprint(conversation.model),
                tokenizer_fingerprint(conversation.tokenizer, parts),
            )
            self._identified = (conversation.model, parts, identity)
        return self._identified[2]

    def _record_anew(self) -> None:
        if self._recorder is not None:
            assert self.conversation is not None
            settings = replace(self.settings, model=_lasting_name(self.settings.model))
            self._recorder.begin(self.conversation, self._identify(), settings)

    def _leave_in_order(self) -> None:
        """The running conversation may be left now: have all of it on the disk."""
        if self._recorder is not None:
            self._recorder.flush()
        self.snapshot()

    def snapshot(self) -> None:
        """Save the cache of the running session, where it has changed since."""
        recorder, conversation = self._recorder, self.conversation
        if recorder is None or recorder.session is None or conversation is None or not self._unsaved_turns:
            return
        if not conversation.log.turns:
            return
        from dataclasses import asdict

        from streamchat.cache import checkpoint
        from streamchat.chat.snapshot import Snapshot, save

        assert self._store is not None
        self.saving.set()
        try:
            identity = self._identify()
            taken = checkpoint.take(conversation.cache)
            ids = conversation.log.ids
            held = type(ids)("i", conversation.log.take(taken.runs))
            saved = Snapshot(
                recorder.session, taken, held, conversation.draw, identity.fingerprint, identity.dtype,
                asdict(self.settings),
            )  # fmt: skip
            save(self._store.snapshot_path(recorder.session), saved)
            self._unsaved_turns = False
        except StoreError as error:
            _log.warning("no snapshot", exc_info=True)
            self.emit(ev.Notice(f"{error}; resuming will read the cache again", "warning"))
        finally:
            self.saving.clear()

    # --- turns -------------------------------------------------------------------------------------------------

    def take_turn(
        self, text: str, cancelled: Callable[[], bool], *, reply: str | None = None, over: Callable[[], None]
    ) -> bool:
        """A turn, told up to `TurnFinished`; returns whether it stays.

        Args:
            text: The user's message.
            cancelled: Asked before each forward.
            reply: The answer, where it is given.
            over: Called when the turn has ended, before that is told.
        """
        conversation = self.conversation
        assert conversation is not None
        self._busy = True
        if cancelled():
            outcome = self._unstarted("cancelled", "")
        else:
            try:
                outcome = conversation.run_turn(text, cancelled, reply)
            except TurnError as error:
                _log.warning("turn failed", exc_info=True)
                outcome = self._unstarted("error", str(error))
            except Exception as error:
                _log.exception("turn failed")
                first = (str(error).splitlines() or [""])[0]
                outcome = self._unstarted(
                    "error", f"the turn failed and was taken back: {type(error).__name__}: {first}"
                )
        self._unsaved_turns |= not outcome.rolled_back
        self._busy = False
        over()
        self._finish(text, outcome)
        every = self.settings.snapshot_turns
        if every and not outcome.rolled_back and outcome.turn % every == 0:
            self.snapshot()
        return not outcome.rolled_back

    def refuse_turn(self, text: str, message: str) -> None:
        """A turn that cannot begin."""
        self._finish(text, self._unstarted("error", message))

    def _unstarted(self, reason: ev.FinishReason, message: str) -> TurnOutcome:
        from streamchat.chat.conversation import TurnOutcome

        assert self.conversation is not None
        number = len(self.conversation.log.turns) + 1
        return TurnOutcome(number, "", reason, 0, 0, None, None, rolled_back=True, message=message)

    def _finish(self, text: str, outcome: TurnOutcome) -> None:
        self.sample_status()
        self.emit(
            ev.TurnFinished(
                stats=self._stats(outcome),
                finish_reason=outcome.finish_reason,
                reply=outcome.reply,
                text=text,
                rolled_back=outcome.rolled_back,
                message=outcome.message,
            )
        )

    def _stats(self, outcome: TurnOutcome) -> ev.TurnStats:
        assert self.conversation is not None
        state = self.conversation.state()
        device = device_memory(self._device)
        return ev.TurnStats(
            turn=outcome.turn,
            prompt_tokens=outcome.prompt_tokens,
            new_tokens=outcome.new_tokens,
            cache_len=state.length,
            cache_size=state.cache_size,
            compressions=state.compressions,
            tokens_evicted=state.tokens_evicted,
            ttft_s=outcome.ttft_s,
            decode_tps=outcome.decode_tps,
            kv_bytes=state.kv_bytes,
            rss_bytes=process_rss(),
            vram_bytes=device.allocated if device else None,
            finish_reason=outcome.finish_reason,
        )

    def undo(self, *, replaced: bool = False, to_edit: bool = False) -> str:
        """Take the newest turn back; returns its message.

        Args:
            replaced: Another try follows.
            to_edit: The user wants the message back.

        Raises:
            ConfigError: There is none.
        """
        conversation = self.conversation
        assert conversation is not None
        started = time.perf_counter()
        turn = conversation.log.turns[-1] if conversation.log.turns else None
        taken = conversation.undo(same_draw=not replaced)
        assert turn is not None
        self._unsaved_turns = True
        if self._recorder is not None:
            self._recorder.undone(turn.number)
        self.emit(
            ev.TurnUndone(
                turn.number,
                turn.text,
                turn.reply,
                conversation.state(),
                taken.restored,
                taken.read_again,
                time.perf_counter() - started,
                replaced,
                to_edit,
            )
        )
        return turn.text

    def undo_as_asked(self, to_edit: bool) -> None:
        """`undo`, with a notice where there is nothing to take back."""
        try:
            self.undo(to_edit=to_edit)
        except ConfigError as error:
            self.emit(ev.Notice(str(error), "warning"))

    def compact(self, cancelled: Callable[[], bool], over: Callable[[], None]) -> None:
        """Have the model sum up the turns that would leave next; the conversation is as before afterwards."""
        from streamchat.chat.compact import summarise

        assert self.conversation is not None
        self._busy = True
        summary = ev.SummaryReady("", (0, 0))
        try:
            summary = summarise(self.conversation, cancelled, self.emit)
        except StreamchatError as error:
            self.emit(ev.Notice(str(error), "warning"))
        except Exception as error:
            _log.exception("summing up failed")
            first = (str(error).splitlines() or [""])[0]
            self.emit(ev.Notice(f"no summary came of it: {type(error).__name__}: {first}", "error"))
        finally:
            self._busy = False
            over()
        self.emit(summary)

    # --- everything else ---------------------------------------------------------------------------------------

    def start_over(self, *, system_prompt: str | None = None) -> None:
        """Forget the conversation; it stays saved."""
        from streamchat.chat.template import choose_format

        conversation = self.conversation
        assert conversation is not None
        settings = self.settings
        if system_prompt is not None:
            settings = replace(settings, system_prompt=system_prompt)
        self._leave_in_order()
        try:
            chat_format = choose_format(conversation.tokenizer, settings.chat_format, settings.system_prompt)
            conversation.start_over(chat_format)
        except ConfigError as error:
            self.emit(ev.Notice(f"Nothing was changed: {error}", "error"))
            return
        self.settings = conversation.settings = settings
        self._unsaved_turns = False
        self._record_anew()
        self.emit(ev.ConversationCleared(settings.system_prompt, conversation.pinned_tokens))

    def count(self, text: str) -> None:
        """Measure a text."""
        assert self.conversation is not None
        self.emit(ev.TextCounted(text, len(self.conversation.encoder.text(text))))

    def set_pin(self, number: int, pinned: bool) -> None:
        """Keep a turn, or let it leave again."""
        assert self.conversation is not None
        try:
            tokens = self.conversation.set_pin(number, pinned)
        except ConfigError as error:
            self.emit(ev.Notice(str(error), "warning"))
            return
        self._unsaved_turns = True
        self.emit(ev.TurnPinned(number, pinned, tokens, self.conversation.state()))

    def set_pin_of_newest(self) -> None:
        """Keep the turn that has just ended."""
        assert self.conversation is not None
        self.set_pin(len(self.conversation.log.turns), True)

    def set_option(self, name: str, value: Any) -> None:
        """Change a live setting."""
        assert self.conversation is not None
        self.settings = self.conversation.settings = replace(self.settings, **{name: value})
        if name == "seed":
            self.conversation.reseed()
        self.emit(ev.SettingChanged(name, value))

    # --- events ------------------------------------------------------------------------------------------------

    def emit(self, event: ev.Event) -> None:
        """Record it, tell it, and say how things stand where that is due."""
        if self._recorder is not None:
            self._recorder.take(event)
        self._tell(event)
        if time.perf_counter() - self._last_status >= STATUS_INTERVAL_S:
            self.sample_status()

    def sample_status(self) -> None:
        """Tell the live figures."""
        conversation = self.conversation
        if conversation is None:
            return
        self._last_status = time.perf_counter()
        device = device_memory(self._device)
        memory = ev.MemoryState(
            rss_bytes=process_rss(),
            device=self._device,
            allocated_bytes=device.allocated if device else None,
            reserved_bytes=device.reserved if device else None,
            total_bytes=device.total if device else None,
        )
        sample = ev.StatusSampled(
            cache=conversation.state(),
            memory=memory,
            ttft_s=conversation.ttft_s,
            decode_tps=conversation.decode_tps,
            busy=self._busy,
        )
        if self._recorder is not None:
            self._recorder.sampled(sample, self._info)
        self._tell(sample)


def _same_model(one: Settings, other: Settings) -> bool:
    """Whether settings load the same weights in the same way."""
    names = ("model", "device", "dtype", "attention")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _lasting_name(model: str) -> str:
    """A model's name that means the same from another folder."""
    with suppress(OSError, RuntimeError, ValueError):
        path = Path(model).expanduser()
        if path.exists():
            return str(path.resolve())
    return model


def _sentences(how: Resumed) -> list[str]:
    """What the user should know, a sentence each."""
    said = []
    if how.read_again:
        said.append(f"{how.read_again:,} tokens were read again in {how.seconds:.1f} s, because {how.reason}.")
    if how.cut_turn:
        said.append(
            f"streamchat ended while the reply of turn {how.cut_turn} was written; what was saved of it is kept."
        )
    if how.message_back:
        said.append("streamchat ended before the last message was answered; it is not part of the conversation.")
    return said
