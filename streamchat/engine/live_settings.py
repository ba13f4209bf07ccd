"""Changes the settings of the active conversation, with the rules that every engine has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.requests import SettingValue
from streamchat.config.loader import Configuration, check_live, check_value
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import StartedConversation, format_with_arguments
from streamchat.sessions.archive import Archive

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.models.sampling import SamplingAdvice


class LiveSettings(ABC):
    """Has the settings of the active conversation. Used on the thread that owns the model.

    Args:
        configuration: Settings and their origins, for messages.
        archive: Saves the conversation.
        emit: Records and publishes an event.
    """

    def __init__(self, configuration: Configuration, archive: Archive, emit: Callable[[ev.Event], None]) -> None:
        self._configuration, self._archive, self._emit = configuration, archive, emit

    @property
    def settings(self) -> Settings:
        """The current settings."""
        return self._configuration.settings

    def origin(self, name: str) -> str:
        """Return where the value of a setting came from."""
        return self._configuration.origin(name)

    @property
    @abstractmethod
    def active(self) -> StartedConversation:
        """The active conversation with its model."""

    @property
    @abstractmethod
    def _advice(self) -> SamplingAdvice:
        """What the model's makers advise."""

    def set_option(self, name: str, value: SettingValue) -> None:
        """Change a live setting.

        Raises:
            ConfigError: The setting or the value is not allowed.
        """
        check_live(name)
        change: dict[str, Any] = {name: check_value(name, value, "/set")}
        changed = replace(self._configuration, settings=replace(self.settings, **change))
        self._change(name, changed.with_origin(name, "/set"))

    def reset_option(self, name: str) -> None:
        """Set a live setting to its default, or to what the model's makers advise.

        Raises:
            ConfigError: The setting cannot change during a chat.
        """
        check_live(name)
        advice = self._advice
        self._change(name, self._configuration.without(name).advised_by(advice.values, advice.origins))

    def _change(self, name: str, configuration: Configuration) -> None:
        """Use `configuration`, which differs in the setting `name` only."""
        if name == "template_args":
            self._change_template(configuration.settings)
        self._use(configuration.settings)
        self._configuration = configuration
        if name == "seed":
            self.active.conversation.reseed()
        self._emit(ev.SettingChanged(name, getattr(configuration.settings, name)))

    def _change_template(self, settings: Settings) -> None:
        """Write later turns with the template arguments of `settings`; a conversation without turns may start over.

        Raises:
            ConfigError: They cannot be used. Nothing has changed then.
        """
        conversation = self.active.conversation
        before = conversation.encoder.format
        chat_format = format_with_arguments(conversation.tokenizer, settings, before)
        if conversation.change_format(chat_format):
            self._use(settings)
            self._archive.start(self.active)
            self._emit(ev.ConversationCleared(settings.system_prompt, conversation.state().pinned))
        for note in conversation.encoder.format.notes:
            if note not in before.notes:
                self._emit(ev.Notice(note))

    def _use(self, settings: Settings) -> None:
        """Use other settings in the active conversation."""
        self._configuration = replace(self._configuration, settings=settings)
        self.active.conversation.settings = settings
