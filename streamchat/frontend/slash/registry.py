"""Slash commands and their registry. The commands themselves are in `streamchat.frontend.slash.commands`.

A command works on the engine and the status board and returns text; how that text is shown is the face's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from streamchat.base.errors import ConfigError, StoreError
from streamchat.base.events import Event
from streamchat.engine.protocol import ChatEngine
from streamchat.frontend.status import StatusBoard


@dataclass(frozen=True)
class SlashResult:
    """What a command came to."""

    text: str = ""
    """To be shown literally; may have several lines."""
    error: bool = False
    quit: bool = False
    message: str = ""
    """To be sent to the model, as if it had been typed."""
    insert: str = ""
    """To be put into the input, unsent."""
    over: Callable[[Event], bool] | None = None
    """The engine is at work as with a turn, until an event for which this is true."""


@dataclass(frozen=True)
class SlashContext:
    """What a command may use."""

    engine: ChatEngine
    board: StatusBoard


@dataclass(frozen=True)
class SlashCommand:
    """One command: `/name arguments`."""

    name: str
    arguments: str
    """Usage of the arguments, '' for none."""
    help: str
    run: Callable[[SlashContext, str], SlashResult]
    aliases: tuple[str, ...] = ()
    complete: Callable[[SlashContext, str], Iterable[tuple[str, str]]] | None = None
    """Argument text so far -> (whole argument, explanation) pairs."""
    starts_over: Callable[[str], bool] = lambda argument: False
    """Whether it forgets the conversation: a running reply is stopped first."""
    asks_engine: bool = False
    """It is answered by an event, so never by an engine that has ended."""
    needs_idle: bool = False
    """It works on what was said, so not while a reply is written."""


_COMMAND = re.compile(r"/([A-Za-z?][\w-]*)(?:\s+(.*))?\s*$", re.DOTALL)


def parse(text: str) -> tuple[str, str] | None:
    """`/name argument` -> (name, argument); None for a message.

    A path such as `/usr/bin/env` is a message, and so is `//word` (see `SlashRegistry.message_text`).
    """
    match = _COMMAND.match(text.strip())
    return (match[1].lower(), (match[2] or "").strip()) if match else None


class SlashRegistry:
    """The commands by name. Faces may add their own."""

    def __init__(self, commands: Iterable[SlashCommand]) -> None:
        self._commands: dict[str, SlashCommand] = {}
        for command in commands:
            self.add(command)

    def add(self, command: SlashCommand) -> None:
        """Add or replace a command."""
        self._commands[command.name] = command

    def __iter__(self) -> Iterator[SlashCommand]:
        return iter(self._commands.values())

    def find(self, name: str) -> SlashCommand | None:
        """The command of that name or alias."""
        for command in self._commands.values():
            if name == command.name or name in command.aliases:
                return command
        return None

    def message_text(self, text: str) -> str:
        """The message that `text` stands for: `//help` is the message `/help`, as is any `//word` by itself.

        Other text with two slashes in front, such as a comment of a program, is as typed.
        """
        parsed = parse(text[1:]) if text.startswith("//") else None
        if parsed is None:
            return text
        name, argument = parsed
        return text[1:] if not argument or self.find(name) is not None else text

    def as_typed(self, text: str) -> str:
        """What to type to send the message `text`: the inverse of `message_text`."""
        return f"/{text}" if text.startswith("/") and self.message_text(f"/{text}") == text else text

    def run(self, context: SlashContext, text: str) -> SlashResult | None:
        """Carry out `text` where it is a command; None where it is a message for the model.

        An unknown command is an error and never goes to the model.
        """
        parsed = parse(text)
        if parsed is None:
            return None
        name, argument = parsed
        command = self.find(name)
        if command is None:
            import difflib

            close = difflib.get_close_matches(name, list(self._commands), n=1)
            hint = f"did you mean /{close[0]}?" if close else "/help lists the commands"
            escape = " (with a word before it, it is text)" if argument else f" (//{name} sends it as text)"
            return SlashResult(f"/{name} is not a command; {hint}{escape}", error=True)
        try:
            return command.run(context, argument)
        except (ConfigError, StoreError) as error:
            return SlashResult(str(error), error=True)

    def completions(self, context: SlashContext, text: str) -> list[tuple[str, str]]:
        """(whole line, explanation) for a line that begins with a slash."""
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

    def help_text(self) -> str:
        """All commands, a line each."""
        rows = [(f"/{c.name} {c.arguments}".rstrip(), c.help) for c in self._commands.values()]
        width = max(len(usage) for usage, _ in rows)
        return "\n".join(f"{usage:<{width}}  {text}" for usage, text in rows)
