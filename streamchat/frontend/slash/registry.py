"""Slash commands and their registry. `streamchat.frontend.slash.commands` registers the commands.

A command acts on the engine and the status board and returns a `SlashResult`, which the front end displays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from streamchat.base.errors import ConfigError, StoreError
from streamchat.base.events import Event
from streamchat.base.suggestions import did_you_mean
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend.status import StatusBoard


@dataclass(frozen=True)
class SlashResult:
    """Result of a command."""

    text: str = ""
    """Text to show literally; may have several lines."""
    error: bool = False
    quit: bool = False
    message: str = ""
    """Message to send to the model, as if the user had typed it."""
    insert: str = ""
    """Text to insert into the input without sending it."""
    done_when: Callable[[Event], bool] | None = None
    """The engine is busy until an event for which this returns True; None if the command is done."""


@dataclass(frozen=True)
class SlashContext:
    """What a command can access."""

    engine: ChatEngine
    board: StatusBoard


@dataclass(frozen=True)
class SlashCommand:
    """One command: `/name arguments`."""

    name: str
    arguments: str
    """Usage of the arguments; '' for none."""
    help: str
    run: Callable[[SlashContext, str], SlashResult]
    aliases: tuple[str, ...] = ()
    complete: Callable[[SlashContext, str], Iterable[tuple[str, str]]] | None = None
    """Argument text so far -> (whole argument, explanation) pairs."""
    starts_over: Callable[[str], bool] = lambda argument: False
    """Whether it starts a new conversation; a running reply is stopped first."""
    asks_engine: bool = False
    """The engine answers with an event, so it fails after the engine has stopped."""
    changes_engine: Callable[[str], bool] = lambda argument: False
    """Whether it changes the engine with this argument, although it only shows something with others."""
    needs_idle: bool = False
    """Requires an idle engine (no reply in progress)."""
    slow: bool = False
    """It may take seconds; the app runs it in another thread. It may only use the engine and files."""

    @property
    def usage(self) -> str:
        """`/name arguments`."""
        return f"/{self.name} {self.arguments}".rstrip()


_COMMAND = re.compile(r"/([A-Za-z?][\w-]*)(?:\s+(.*))?\s*$", re.DOTALL)


def parse(text: str) -> tuple[str, str] | None:
    """Split `/name argument` into (name, argument); None for a message.

    A path such as `/usr/bin/env` is a message, as is `//word` (see `SlashRegistry.unescape`).
    """
    match = _COMMAND.match(text.strip())
    return (match[1].lower(), (match[2] or "").strip()) if match else None


class SlashRegistry:
    """Commands by name. Front ends may add their own."""

    def __init__(self) -> None:
        self._commands: dict[str, SlashCommand] = {}

    def add(self, command: SlashCommand) -> None:
        """Add or replace a command."""
        self._commands[command.name] = command

    def __iter__(self) -> Iterator[SlashCommand]:
        return iter(self._commands.values())

    def find(self, name: str) -> SlashCommand | None:
        """Return the command with this name or alias; None if there is none."""
        for command in self._commands.values():
            if name == command.name or name in command.aliases:
                return command
        return None

    def unescape(self, text: str) -> str:
        """Unescape `text`: `//help` becomes the message `/help`, as does any single `//word`.

        Other text that starts with two slashes, such as a comment in source code, is unchanged.
        """
        parsed = parse(text[1:]) if text.startswith("//") else None
        if parsed is None:
            return text
        name, argument = parsed
        return text[1:] if not argument or self.find(name) is not None else text

    def escape(self, text: str) -> str:
        """Escape `text` for the input: the inverse of `unescape`."""
        return f"/{text}" if text.startswith("/") and self.unescape(f"/{text}") == text else text

    def run(self, context: SlashContext, text: str) -> SlashResult | None:
        """Run `text` if it is a command; None if it is a message for the model.

        An unknown command is an error and is never sent to the model.
        """
        parsed = parse(text)
        if parsed is None:
            return None
        name, argument = parsed
        command = self.find(name)
        if command is None:
            hint = did_you_mean(name, self._commands, show="/{}".format) or "; /help lists the commands"
            escape = " (put a word before it to send it as text)" if argument else f" (//{name} sends it as text)"
            return SlashResult(f"/{name} is not a command{hint}{escape}", error=True)
        try:
            return command.run(context, argument)
        except (ConfigError, StoreError) as error:
            return SlashResult(str(error), error=True)

    def completions(self, context: SlashContext, text: str) -> list[tuple[str, str]]:
        """(whole line, explanation) pairs for a line that starts with a slash."""
        if not text.startswith("/") or text.startswith("//"):
            return []
        name, space, argument = text[1:].partition(" ")
        if not space:
            return [
                (f"/{command.name}", command.help)
                for command in self._commands.values()
                if any(word.startswith(name.lower()) for word in (command.name, *command.aliases))
            ]
        command = self.find(name.lower())
        if command is None or command.complete is None:
            return []
        return [(f"/{command.name} {whole}", note) for whole, note in command.complete(context, argument.lstrip())]
