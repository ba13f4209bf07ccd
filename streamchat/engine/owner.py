"""The engine's thread: owns model, cache, conversation and archive, and executes requests.

Nothing here may be called from another thread; use `Engine`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, SessionError, StreamchatError, TurnError, TurnFailure
from streamchat.base.sanitize import encodable
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import Load, Progress, StartedConversation, assemble
from streamchat.sessions.archive import ActiveConversation, Archive, OpenStore
from streamchat.sessions.settings import foreign_model, foreign_model_notice, resumed_configuration
from streamchat.telemetry.memory import device_memory, free_unused, process_rss

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.conversation import Conversation
    from streamchat.conversation.generation import TurnOutcome
    from streamchat.models.load import LoadedModel

_log = logging.getLogger(__name__)
STATUS_INTERVAL_S = 0.5


class Owner:
    """Owns model, conversation and archive.

    Args:
        configuration: Settings and their origins, for messages.
        load: Loads the model.
        publish: Sends an event to the front ends.
        progress: Reports the progress of loading; may raise to stop it.
        open_store: Opens the store; None if nothing is saved.
    """

    def __init__(
        self,
        configuration: Configuration,
        load: Load,
        publish: Callable[[ev.Event], None],
        progress: Progress,
        open_store: OpenStore | None,
    ) -> None:
        self._configuration, self._load, self._publish, self._progress = configuration, load, publish, progress
        self.settings = configuration.settings
        self.conversation: Conversation | None = None
        self.archive = Archive(open_store, publish)
        self._loaded: LoadedModel | None = None
        self._info: ev.ModelInfo | None = None
        self._device = "cpu"
        self._busy = False
        self._pin_next = False
        """Whether to pin the next turn, because it replaces a pinned one."""
        self._last_status = 0.0

    # --- start and end -----------------------------------------------------------------------------------------

    def start(self, session: str | None, agreed_model: str = "") -> None:
        """Load the model and start a new conversation, or resume the saved `session` (see `open_session`).

        Raises:
            StreamchatError: No conversation could be started.
        """
        self.archive.open(required=session is not None)
        if session is None:
            self._prepare(self._configuration)
            self.archive.start(self._active)
            if sentence := self.archive.unclean_exit_notice():
                self.emit(ev.Notice(sentence))
        else:
            self._open_session(session, agreed_model)

    def end(self) -> None:
        """Save everything and close."""
        try:
            self._flush_and_snapshot()
            self.archive.close()
        except Exception:
            _log.exception("saving at the end failed")
        if self.conversation is not None:
            self.conversation.close()

    @property
    def _active(self) -> ActiveConversation:
        assert self.conversation is not None
        assert self._info is not None
        return ActiveConversation(self.conversation, self._info, self.settings)

    def _flush_and_snapshot(self) -> None:
        """Flush the active conversation to disk before switching away."""
        self.archive.flush_and_snapshot(None if self.conversation is None else self._active)

    # --- the model ---------------------------------------------------------------------------------------------

    def _prepare(
        self, configuration: Configuration, *, reuse: bool = False, then: Callable[[], None] = lambda: None
    ) -> None:
        """Start a conversation on the model of `configuration`, and emit `ModelReady`.

        Args:
            configuration: Settings and their origins.
            reuse: Reuse the loaded model if it is the same.
            then: Called before `ModelReady` is emitted, so that front ends see its effect by then.
        """
        started = time.perf_counter()
        self._progress("Starting", 0, 0, "")
        same = reuse and self._loaded is not None and _same_model(configuration.settings, self.settings)
        previous = self.conversation
        loaded = self._loaded if same and self._loaded is not None else self._load(configuration, self._progress)
        if same and previous is not None:
            previous.close()  # only one hook per model
        try:
            assembled = assemble(configuration, loaded, self.emit, self._progress)
        except BaseException:
            if same and previous is not None:
                previous.reopen()
            raise
        self._install(configuration, loaded, assembled)
        if not same:
            self.archive.release_model()
        if previous is not None:
            previous.close()
            previous = None
            free_unused()
            self.emit(ev.ConversationCleared(self.settings.system_prompt, assembled.info.pinned_tokens))
        load_s = time.perf_counter() - started
        then()
        self.emit(ev.ModelReady(assembled.info, load_s))
        for text in assembled.notes:
            self.emit(ev.Notice(text))

    def _install(self, configuration: Configuration, loaded: LoadedModel, assembled: StartedConversation) -> None:
        self._loaded, self._info, self.conversation = loaded, assembled.info, assembled.conversation
        self._configuration, self.settings = configuration, configuration.settings
        self._device = assembled.device
        self._pin_next = False

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it; keep the old one if that fails."""
        settings = replace(self.settings, model=name)
        origins = {**self._configuration.origins, "model": "/model"}
        self._flush_and_snapshot()
        try:
            self._prepare(replace(self._configuration, settings=settings, origins=origins))
        except StreamchatError as error:
            _log.warning("switching to %s failed", name, exc_info=True)
            self.emit(ev.Notice(f"{error}; keeping the current model", "error"))
        except Exception as error:
            _log.exception("switching to %s failed", name)
            first = (str(error).splitlines() or [""])[0]
            text = f"{name} could not be loaded ({type(error).__name__}: {first}); keeping the current model"
            self.emit(ev.Notice(text, "error"))
        else:
            self.archive.start(self._active)

    # --- saved sessions ----------------------------------------------------------------------------------------

    def open_session(self, session: str, agreed_model: str = "") -> None:
        """Close the current session, which stays saved, and resume another one.

        Args:
            session: Session id.
            agreed_model: The model that the user agreed to load, if only an imported file named it.
        """
        if self.archive.recorder is None:
            self.emit(ev.Notice("Sessions are not saved in this run, so none can be opened.", "error"))
            return
        if session == self.archive.session:
            self.emit(ev.Notice(f"The session {session} is already open."))
            return
        self._flush_and_snapshot()
        previous = self.conversation
        try:
            self._open_session(session, agreed_model)
        except Exception as error:
            _log.warning("opening %s failed", session, exc_info=True)
            what = str(error)
            if not isinstance(error, StreamchatError):
                what = f"{session} could not be opened ({type(error).__name__}: {(what.splitlines() or [''])[0]})"
            if self.conversation is previous:
                what += "; the current conversation continues"
            else:
                what += "; it stays saved, and a new conversation was started"
                self.archive.start(self._active)
                self.emit(ev.ModelReady(self._active.info, 0.0))
            self.emit(ev.Notice(what, "error"))

    def _open_session(self, session: str, agreed_model: str) -> None:
        claimed = self.archive.claim(session)
        model = foreign_model(self._configuration, claimed.info)
        if model and model != agreed_model:
            claimed.lock.release()
            sentence = foreign_model_notice(claimed.info, model)
            raise SessionError(f"{sentence}; `/resume {session} yes` loads it")
        sentences: list[str] = []

        def restore() -> None:
            event, notices = self.archive.restore(self._active, claimed)
            sentences.extend(notices)
            self.emit(ev.SessionOpened(event.session))
            self.emit(event)

        try:
            self._prepare(resumed_configuration(self._configuration, claimed.info), reuse=True, then=restore)
        except BaseException:
            claimed.lock.release()
            raise
        for text in sentences:
            self.emit(ev.Notice(text))

    # --- turns -------------------------------------------------------------------------------------------------

    def run_turn(
        self,
        text: str,
        cancelled: Callable[[], bool],
        *,
        reply: str | None = None,
        pin: bool = False,
        on_done: Callable[[], None],
    ) -> None:
        """Run a turn, emit its events up to `TurnFinished`, and pin it if requested.

        Args:
            text: The user's message.
            cancelled: Called before each forward; returns whether to stop.
            reply: A given reply; None to generate one.
            pin: Pin the turn unless it is rolled back. A turn that replaces a pinned one is always pinned.
            on_done: Called when the turn has ended, before `TurnFinished` is emitted.
        """
        conversation = self.conversation
        assert conversation is not None
        self._busy = True
        if cancelled():
            outcome = self._failed_outcome("cancelled")
        else:
            try:
                outcome = conversation.run_turn(text, cancelled, reply)
            except TurnError as error:
                _log.warning("turn failed", exc_info=True)
                outcome = self._failed_outcome("error", str(error), error.failure)
            except Exception as error:
                _log.exception("turn failed")
                first = (str(error).splitlines() or [""])[0]
                outcome = self._failed_outcome(
                    "error", f"the turn failed and was rolled back: {type(error).__name__}: {first}", "other"
                )
        self.archive.changed |= not outcome.rolled_back
        self._busy = False
        on_done()
        self._finish(text, outcome)
        if outcome.rolled_back:
            return
        if pin or self._pin_next:
            self._pin_next = False
            self.set_pin(outcome.turn, True)
        every = self.settings.snapshot_turns
        if every and outcome.turn % every == 0:
            self.archive.snapshot(self._active)

    def replace_turn(self, text: str | None, cancelled: Callable[[], bool], *, on_done: Callable[[], None]) -> None:
        """Undo the newest turn and reply to `text` instead, or to its own message again.

        Args:
            text: The changed message; None for the same one.
            cancelled: Called before each forward; returns whether to stop.
            on_done: Called when the new turn has ended, before `TurnFinished` is emitted.
        """
        try:
            before = self.undo(replaced=True)
        except ConfigError as error:
            on_done()
            self.refuse_turn(text or "", str(error))
            return
        self.run_turn(before if text is None else text, cancelled, on_done=on_done)

    def refuse_turn(self, text: str, message: str) -> None:
        """Emit `TurnFinished` with an error for a turn that cannot start."""
        self._finish(text, self._failed_outcome("error", message, "other"))

    def _failed_outcome(self, reason: ev.FinishReason, message: str = "", failure: TurnFailure = "") -> TurnOutcome:
        from streamchat.conversation.generation import TurnOutcome

        assert self.conversation is not None
        number = len(self.conversation.log.turns) + 1
        return TurnOutcome(number, "", reason, 0, 0, None, None, rolled_back=True, message=message, failure=failure)

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
                failure=outcome.failure,
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
        """Undo the newest turn; return its message.

        A turn that replaces a pinned one (`replaced`, `to_edit`) will also be pinned.

        Args:
            replaced: Whether another turn replaces it.
            to_edit: Whether the user wants to edit the message.

        Raises:
            ConfigError: Nothing to undo, or the turn is too old.
        """
        from streamchat.conversation.pins import is_pinned

        conversation = self.conversation
        assert conversation is not None
        started = time.perf_counter()
        turn = conversation.log.turns[-1] if conversation.log.turns else None
        was_pinned = turn is not None and is_pinned(turn, conversation.cache.pins, conversation.cache.num_sink_tokens)
        result = conversation.undo(restore_rng=not replaced)
        assert turn is not None
        self._pin_next = was_pinned and (replaced or to_edit)
        self.archive.record_undo(turn.number)
        self.emit(
            ev.TurnUndone(
                turn.number,
                turn.text,
                turn.reply,
                conversation.state(),
                result.restored,
                result.read_again,
                time.perf_counter() - started,
                replaced,
                to_edit,
            )
        )
        return turn.text

    def undo_as_asked(self, to_edit: bool) -> None:
        """Call `undo`; emit a notice if there is nothing to undo."""
        try:
            self.undo(to_edit=to_edit)
        except ConfigError as error:
            self.emit(ev.Notice(str(error), "warning"))

    def compact(self, cancelled: Callable[[], bool], on_done: Callable[[], None]) -> None:
        """Summarize the turns to be evicted next; the conversation does not change."""
        from streamchat.conversation.summarize import summarize

        assert self.conversation is not None
        self._busy = True
        summary = ev.SummaryReady("", (0, 0))
        try:
            summary = summarize(self.conversation, cancelled, self.emit)
        except StreamchatError as error:
            self.emit(ev.Notice(str(error), "warning"))
        except Exception as error:
            _log.exception("summarizing failed")
            first = (str(error).splitlines() or [""])[0]
            self.emit(ev.Notice(f"summarizing failed: {type(error).__name__}: {first}", "error"))
        finally:
            self._busy = False
            on_done()
        self.emit(summary)

    # --- everything else ---------------------------------------------------------------------------------------

    def start_over(self, *, system_prompt: str | None = None) -> None:
        """Clear the conversation; its session stays saved."""
        from streamchat.conversation.template.format import choose_format

        conversation = self.conversation
        assert conversation is not None
        settings = self.settings
        if system_prompt is not None:
            settings = replace(settings, system_prompt=system_prompt)
        before = conversation.encoder.format
        self._flush_and_snapshot()
        try:
            chat_format = choose_format(conversation.tokenizer, settings.chat_format, settings.system_prompt)
            conversation.start_over(chat_format)
        except ConfigError as error:
            self.emit(ev.Notice(f"Nothing has changed: {error}", "error"))
            return
        self.settings = conversation.settings = settings
        self._pin_next = False
        self.archive.start(self._active)
        self.emit(ev.ConversationCleared(settings.system_prompt, conversation.pinned_tokens))
        for note in chat_format.notes:
            if note not in before.notes:  # caused by the new system prompt
                self.emit(ev.Notice(note))

    def count(self, text: str) -> None:
        """Count the tokens of a text."""
        assert self.conversation is not None
        self.emit(ev.TextCounted(text, len(self.conversation.encoder.text(encodable(text)))))

    def set_pin(self, number: int, pinned: bool) -> None:
        """Pin or unpin a turn."""
        assert self.conversation is not None
        try:
            tokens = self.conversation.set_pin(number, pinned)
        except ConfigError as error:
            self.emit(ev.Notice(str(error), "warning"))
            return
        self.archive.changed = True
        self.emit(ev.TurnPinned(number, pinned, tokens, self.conversation.state()))

    def set_option(self, name: str, value: Any) -> None:
        """Change a live setting."""
        assert self.conversation is not None
        self.settings = self.conversation.settings = replace(self.settings, **{name: value})
        if name == "seed":
            self.conversation.reseed()
        self.emit(ev.SettingChanged(name, value))

    # --- events ------------------------------------------------------------------------------------------------

    def emit(self, event: ev.Event) -> None:
        """Record and publish an event; sample the status if it is due."""
        self.archive.record(event)
        self._publish(event)
        if time.perf_counter() - self._last_status >= STATUS_INTERVAL_S:
            self.sample_status()

    def sample_status(self) -> None:
        """Publish the live figures."""
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
        self.archive.record_status(sample, self._info)
        self._publish(sample)


def _same_model(one: Settings, other: Settings) -> bool:
    """Return whether both settings load the same weights in the same way."""
    names = ("model", "device", "dtype", "weights", "kernels", "attention")
    return all(getattr(one, name) == getattr(other, name) for name in names)
