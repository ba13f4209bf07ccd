"""All settings as rows for a screen: value, origin, meaning, and when a change takes effect. Knows no front end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.jsonlines import json_line
from streamchat.base.requests import ResetOption, SetOption
from streamchat.config import loader
from streamchat.config.files import LOCAL
from streamchat.config.loader import SESSION_ORIGIN, Configuration
from streamchat.config.settings import default_of, setting_fields, spec_of
from streamchat.config.writing import write_settings
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend import file_access

COMMANDS = {"model": "/model NAME", "system_prompt": "/system TEXT", "theme": "/theme NAME"}
"""Settings that a command changes during a chat."""
_BOOLEANS = ("true", "false")


@dataclass(frozen=True)
class SettingRow:
    """One setting."""

    name: str
    section: str
    help: str
    value: str
    """The value in use, as text."""
    origin: str
    """Where it came from."""
    wanted: str | None = None
    """A value that the user gave and that is not used yet: for the next turn, or for the next start."""
    note: str = ""
    """When that value, or the default, will be used; '' if none waits."""

    @property
    def live(self) -> bool:
        """Whether a change takes effect during the chat."""
        return spec_of(self.name).live

    @property
    def legal(self) -> str:
        """The legal values."""
        return "true or false" if isinstance(default_of(self.name), bool) else spec_of(self.name).legal()

    @property
    def choices(self) -> tuple[str, ...]:
        """Values to choose from; empty if any text or number may be given."""
        return _BOOLEANS if isinstance(default_of(self.name), bool) else spec_of(self.name).choices

    @property
    def effect(self) -> str:
        """When a change takes effect."""
        if self.live:
            return "a change takes effect with the next turn"
        now = f"; {COMMANDS[self.name]} changes it now" if self.name in COMMANDS else ""
        return f"a change needs a new load: it takes effect at the next start{now}"


class SettingsTable:
    """The settings of a chat, with the values that wait for the engine or for the next start.

    Args:
        engine: Has the settings in use.
        configuration: Where the settings of this start came from.
    """

    def __init__(self, engine: ChatEngine, configuration: Configuration) -> None:
        self._engine, self._configuration = engine, configuration
        self._wanted: dict[str, Any] = {}
        self._waiting: set[str] = set()
        """Those of `_wanted` that the engine was asked to use."""
        self._resets: set[str] = set()
        """Those that the user reset and whose default is not used yet."""
        self._written: set[str] = set()
        """Those of `_wanted` that are in the configuration file."""

    def rows(self, words: str = "") -> list[SettingRow]:
        """Return the settings in which all of `words` occur, in the order of the configuration file."""
        wanted = words.lower().replace("-", "_").split()
        rows = [self.row(name) for name in setting_fields()]
        return [row for row in rows if all(word in _searched(row) for word in wanted)]

    def best_match(self, words: str) -> str:
        """Return the setting whose name fits `words` best; '' if they are in no name."""
        wanted = "_".join(words.lower().replace("-", "_").split())
        return min((name for name in setting_fields() if wanted and wanted in name), key=len, default="")

    def row(self, name: str) -> SettingRow:
        """Return one setting."""
        spec = spec_of(name)
        wanted = shown_value(self._wanted[name]) if name in self._wanted else None
        value = shown_value(getattr(self._engine.settings, name))
        return SettingRow(name, spec.section, spec.help, value, self._engine.origin(name), wanted, self._note(name))

    def _note(self, name: str) -> str:
        if name in self._resets and name in self._waiting:
            return "reset, next turn"
        if name not in self._wanted:
            return ""
        if name in self._waiting:
            return "with the next turn"
        return "next start" if name in self._written else "next start, not written yet"

    def check(self, name: str, text: str) -> Any:
        """Return the value that `text` stands for. Raises ConfigError with a sentence without an origin."""
        try:
            return loader.check_value(name, loader.parse_text(name, text, ""), "")
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix(": ")) from None

    def want(self, name: str, value: Any) -> None:
        """Remember a value for the next start; the value in use needs none."""
        self.used(name)
        if value != getattr(self._engine.settings, name):
            self._wanted[name] = value

    def ask(self, name: str, value: Any) -> None:
        """Ask the engine to use a value; it may be busy, so the value waits for `used`."""
        self.used(name)
        self._wanted[name] = value
        self._waiting.add(name)
        self._engine.send(SetOption(name, value))

    def reset(self, name: str, *, now: bool) -> None:
        """Reset a setting to its default, or to what the model's makers advise.

        Args:
            name: The setting.
            now: Ask the engine, which may be busy; otherwise the default is for the next start.
        """
        if now:
            self.used(name)
            self._waiting.add(name)
        else:
            self.want(name, default_of(name))
        self._resets.add(name)
        if now:
            self._engine.send(ResetOption(name))

    def used(self, name: str) -> None:
        """Forget the value that waited: the setting has changed."""
        self._wanted.pop(name, None)
        self._waiting.discard(name)
        self._resets.discard(name)
        self._written.discard(name)

    def waits_for_start(self, name: str) -> bool:
        """Whether a value waits for the next start."""
        return name in self._wanted and name not in self._waiting

    def follow(self, event: ev.Event) -> None:
        """Forget values that waited for the engine once it uses them, or refuses one."""
        if isinstance(event, ev.SettingChanged):
            self.used(event.name)
        elif isinstance(event, ev.Notice) and event.level != "info":
            for name in list(self._waiting):
                self.used(name)

    def write(self, name: str) -> str:
        """Write a setting into the user's configuration file; return a sentence about it.

        A value that equals the default removes the line, so that the default, or the model's advice, holds.

        Raises:
            ConfigError: The file cannot be changed.
        """
        file_access.require("writing config.toml")
        value, file = self._wanted.get(name, getattr(self._engine.settings, name)), self.file()
        if name not in self._resets and (name in self._wanted or self._is_chosen(name)):
            keep = value != default_of(name) or spec_of(name).by_model
        else:
            keep = False
        write_settings(file, {name: value if keep else None})
        self._written.add(name)
        written = f"{name} = {json_line(value)} is written to" if keep else f"{name} has its default, and is not set in"
        return f"{written} {file}{self._overriding(name)}"

    def file(self) -> Path:
        """Return the file that is written: that of `--config`, else the user's own."""
        read = self._configuration.file
        own = read is None or (self._configuration.local is not None and read == LOCAL)
        return loader.user_file() if own or read is None else read

    def _is_chosen(self, name: str) -> bool:
        """Whether a user chose the value, in any way; if not, it is the default or was advised."""
        origin = self._engine.origin(name)
        return origin in {*self._configuration.origins.values(), "/set", "/model"} or origin.startswith(SESSION_ORIGIN)

    def _overriding(self, name: str) -> str:
        """Return the end of the sentence if another source overrides the file at the next start; '' if none does."""
        variable = loader.ENV_PREFIX + name.upper()
        if os.environ.get(variable):
            return f"; the variable {variable} overrides it"
        local = self._configuration.local
        if local is not None and name in local.used:
            return f"; {local.file.path} overrides it in this folder"
        flag = self._configuration.origins.get(name, "")
        return f"; the flag {flag} of this start is not repeated by itself" if flag.startswith("-") else ""


def shown_value(value: Any) -> str:
    """Return a value as the user types it."""
    return json_line(value) if isinstance(value, bool) else str(value)


def _searched(row: SettingRow) -> str:
    return " ".join((row.name, row.section, row.help, row.value, row.origin)).lower().replace("-", "_")
