"""The formats of turns for system prompts; learning one from a chat template takes about 50 ms."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

from streamchat.config.settings import Settings
from streamchat.conversation.assemble import format_from_settings
from streamchat.conversation.reply import PreparedFormat, prepare_format

MAX_FORMATS = 256
_CLOCK = "strftime_now"


class Formats:
    """Keeps the formats of the latest system prompts. A format with a clock is made for each conversation.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        settings: The settings of the server.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._kept: OrderedDict[str, PreparedFormat] = OrderedDict()

    def of_settings(self, settings: Settings) -> PreparedFormat:
        """Return the format of turns with these settings; those of a session may have other template arguments."""
        if settings.template_args == self._settings.template_args:
            return self.of(settings.system_prompt)
        return prepare_format(self._model, self._tokenizer, format_from_settings(self._tokenizer, settings))

    def of(self, system_prompt: str) -> PreparedFormat:
        """Return the format of turns with this system prompt."""
        found = self._kept.get(system_prompt)
        if found is None:
            chosen = format_from_settings(self._tokenizer, replace(self._settings, system_prompt=system_prompt))
            found = prepare_format(self._model, self._tokenizer, chosen)
            if _CLOCK in chosen.source:
                return found
            self._kept[system_prompt] = found
            if len(self._kept) > MAX_FORMATS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(system_prompt)
        return found
