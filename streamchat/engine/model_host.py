"""Loads models, and starts, clears and resumes conversations on them. Runs on the engine's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, SessionError, StreamchatError, describe_unexpected
from streamchat.base.progress import Progress
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import Load, StartedConversation, assemble, format_from_settings
from streamchat.engine.live_settings import LiveSettings
from streamchat.sessions.archive import Archive
from streamchat.sessions.settings import (
    foreign_model,
    foreign_model_notice,
    resumed_configuration,
    sampling_notices,
    without_session_sampling,
)
from streamchat.telemetry.memory import free_unused

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.models.load import LoadedModel
    from streamchat.models.sampling import SamplingAdvice

_log = logging.getLogger(__name__)


class ModelHost(LiveSettings):
    """Owns the model and the active conversation.

    Args:
        configuration: Settings and their origins, for messages.
        load: Loads the model.
        archive: Saves and restores conversations.
        emit: Records and publishes an event.
        progress: Reports the progress of loading; may raise to stop it.
    """

    def __init__(
        self,
        configuration: Configuration,
        load: Load,
        archive: Archive,
        emit: Callable[[ev.Event], None],
        progress: Progress,
    ) -> None:
        super().__init__(configuration, archive, emit)
        self._given, self._load, self._progress = configuration, load, progress
        self._loaded: LoadedModel | None = None
        self.started: StartedConversation | None = None
        """The active conversation; None until the first model is loaded."""
        self.pin_next = False
        """Whether to pin the next turn, because it replaces a pinned one."""

    @property
    def _advice(self) -> SamplingAdvice:
        assert self._loaded is not None
        return self._loaded.advice

    @property
    def active(self) -> StartedConversation:
        """The active conversation with its model. There is one once `start` has returned."""
        assert self.started is not None
        return self.started

    # --- start and end -----------------------------------------------------------------------------------------

    def start(self, session: str | None, agreed_model: str = "") -> None:
        """Load the model and start a new conversation, or resume the saved `session` (see `open_session`).

        Raises:
            StreamchatError: No conversation could be started.
        """
        self._archive.open(required=session is not None)
        if session is None:
            self._prepare(self._configuration)
            self._archive.start(self.active)
            if sentence := self._archive.unclean_exit_notice():
                self._emit(ev.Notice(sentence))
        else:
            self._open_session(session, agreed_model)

    def end(self) -> None:
        """Save everything and close."""
        try:
            self._archive.flush_and_snapshot(self.started)
            self._archive.close()
        except Exception:
            _log.exception("saving at the end failed")
        if self.started is not None:
            self.started.conversation.close()

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
        previous = None if self.started is None else self.started.conversation
        loaded = self._loaded if same and self._loaded is not None else self._load(configuration, self._progress)
        configuration = configuration.advised_by(loaded.advice.values, loaded.advice.origins)
        if same and previous is not None:
            previous.close()  # only one hook per model
        try:
            assembled = assemble(configuration, loaded, self._emit, self._progress)
        except BaseException:
            if same and previous is not None:
                previous.reopen()
            raise
        self._loaded, self.started, self._configuration = loaded, assembled, configuration
        self.pin_next = False
        if not same:
            self._archive.release_model()
        if previous is not None:
            previous.close()
            previous = None
            free_unused()
            self._emit(ev.ConversationCleared(self.settings.system_prompt, assembled.info.pinned_tokens))
        load_s = time.perf_counter() - started
        then()
        self._emit(ev.ModelReady(assembled.info, load_s))
        for text in assembled.notes:
            self._emit(ev.Notice(text))

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it; keep the old one if that fails."""
        base = without_session_sampling(self._configuration, self._given)
        # an adapter belongs to the model that it was trained on
        settings = replace(base.settings, model=name, adapter="")
        origins = {**base.origins, "model": "/model", "adapter": "/model"}
        self._archive.flush_and_snapshot(self.started)
        try:
            self._prepare(replace(base, settings=settings, origins=origins))
        except StreamchatError as error:
            _log.warning("switching to %r failed", name, exc_info=True)
            self._emit(ev.Notice(f"{error}; keeping the current model", "error"))
        except Exception as error:
            _log.exception("switching to %r failed", name)
            text = f"{name} could not be loaded ({describe_unexpected(error)}); keeping the current model"
            self._emit(ev.Notice(text, "error"))
        else:
            self._archive.start(self.active)

    # --- conversations -----------------------------------------------------------------------------------------

    def start_over(self, *, system_prompt: str | None = None) -> None:
        """Clear the conversation; its session stays saved."""
        conversation, settings = self.active.conversation, self.settings
        if system_prompt is not None:
            settings = replace(settings, system_prompt=system_prompt)
        before = conversation.encoder.format
        self._archive.flush_and_snapshot(self.started)
        try:
            chat_format = format_from_settings(conversation.tokenizer, settings)
            conversation.start_over(chat_format)
        except ConfigError as error:
            self._emit(ev.Notice(f"Nothing has changed: {error}", "error"))
            return
        self._use(settings)
        self.pin_next = False
        self._archive.start(self.active)
        self._emit(ev.ConversationCleared(settings.system_prompt, conversation.state().pinned))
        for note in chat_format.notes:
            if note not in before.notes:  # caused by the new system prompt
                self._emit(ev.Notice(note))

    def open_session(self, session: str, agreed_model: str = "") -> None:
        """Close the current session, which stays saved, and resume another one.

        Args:
            session: Session id.
            agreed_model: The model that the user agreed to load, if only an imported file named it.
        """
        was_saved = self._archive.recorder is not None
        if not was_saved and not self._archive.can_save:
            self._emit(ev.Notice("Sessions are not saved in this run, so none can be opened.", "error"))
            return
        if was_saved and session == self._archive.session:
            self._emit(ev.Notice(f"The session {session} is already open."))
            return
        previous = self.started
        self._archive.flush_and_snapshot(previous)
        try:
            self._archive.open(required=True)
            self._open_session(session, agreed_model)
        except Exception as error:
            if not was_saved:
                self._archive.close()
            _log.warning("opening %r failed", session, exc_info=True)
            known = isinstance(error, StreamchatError)
            what = str(error) if known else f"{session} could not be opened ({describe_unexpected(error)})"
            if self.started is previous:
                what += "; the current conversation continues"
            else:
                what += "; it stays saved, and a new conversation was started"
                self._archive.start(self.active)
                self._emit(ev.ModelReady(self.active.info, 0.0))
            self._emit(ev.Notice(what, "error"))

    def _open_session(self, session: str, agreed_model: str) -> None:
        claimed = self._archive.claim(session)
        model = foreign_model(self._configuration, claimed.info)
        if model and model != agreed_model:
            claimed.lock.release()
            sentence = foreign_model_notice(claimed.info, model)
            raise SessionError(f"{sentence}; `/resume {session} yes` loads it")
        sentences: list[str] = []

        def restore() -> None:
            event, notices = self._archive.restore(self.active, claimed)
            sentences.extend(notices)
            self._emit(ev.SessionOpened(event.session))
            self._emit(event)

        try:
            self._prepare(resumed_configuration(self._configuration, claimed.info), reuse=True, then=restore)
        except BaseException:
            claimed.lock.release()
            raise
        assert self._loaded is not None
        new_chat = self._given.advised_by(self._loaded.advice.values, self._loaded.advice.origins)
        sentences += sampling_notices(self._configuration, new_chat)
        for text in sentences:
            self._emit(ev.Notice(text))


def _same_model(one: Settings, other: Settings) -> bool:
    """Return whether both settings load the same weights in the same way."""
    names = ("model", "adapter", "device", "dtype", "weights", "kernels", "decode", "attention", "kv_dtype")
    return all(getattr(one, name) == getattr(other, name) for name in names)
