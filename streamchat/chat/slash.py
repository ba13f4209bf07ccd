"""The slash commands, in one registry for every face.

A command works on the engine and the status board and returns text; how that text is shown is the face's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from streamchat import config
from streamchat.chat.client import ChatEngine
from streamchat.chat.status import StatusBoard, memory_figures
from streamchat.errors import ConfigError
from streamchat.settings import setting_fields, spec_of
from streamchat.units import human_bytes, human_seconds


@dataclass(frozen=True)
class SlashResult:
    """What a command came to."""

    text: str = ""
    """To be shown literally; may have several lines."""
    error: bool = False
    quit: bool = False


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


_COMMAND = re.compile(r"/([A-Za-z?][\w-]*)(?:\s+(.*))?\s*$", re.DOTALL)


def parse(text: str) -> tuple[str, str] | None:
    """`/name argument` -> (name, argument); None for a message.

    A path such as `/usr/bin/env` is a message; `//word` is the message `/word` (see `message_text`).
    """
    match = _COMMAND.match(text.strip())
    return (match[1].lower(), (match[2] or "").strip()) if match else None


def message_text(text: str) -> str:
    """The message that a line which is no command stands for: a doubled slash at the start is one slash."""
    return text[1:] if text.startswith("//") else text


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
            return SlashResult(f"/{name} is not a command; {hint} (//{name} sends it as text)", error=True)
        try:
            return command.run(context, argument)
        except ConfigError as error:
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


def default_registry() -> SlashRegistry:
    """The commands that every face has."""
    registry = SlashRegistry([])

    def show_help(context: SlashContext, argument: str) -> SlashResult:
        if argument:
            command = registry.find(argument.lstrip("/").lower())
            if command is None:
                return SlashResult(f"/{argument.lstrip('/')} is not a command; /help lists them", error=True)
            return SlashResult(f"/{command.name} {command.arguments}".rstrip() + f"  {command.help}")
        return SlashResult(registry.help_text())

    def complete_help(context: SlashContext, argument: str) -> list[tuple[str, str]]:
        return [(c.name, c.help) for c in registry._commands.values() if c.name.startswith(argument)]

    for command in (
        SlashCommand("help", "[COMMAND]", "list the commands", show_help, ("h", "?"), complete_help),
        SlashCommand("clear", "", "forget the conversation; keep model, system prompt and settings", _clear, ("new",)),
        SlashCommand(
            "system",
            "[TEXT]",
            "show the system prompt, or start over with another one ('none' removes it)",
            _system,
        ),
        SlashCommand("set", "[NAME [VALUE]]", "show or change a setting for the next turns", _set, (), _complete_set),
        SlashCommand("stats", "", "cache, memory and speed so far", _stats, ("status",)),
        SlashCommand("quit", "", "leave", lambda context, argument: SlashResult(quit=True), ("exit", "q")),
    ):
        registry.add(command)
    return registry


def _clear(context: SlashContext, argument: str) -> SlashResult:
    context.engine.clear()
    return SlashResult()


def _system(context: SlashContext, argument: str) -> SlashResult:
    if not argument:
        prompt = context.engine.settings.system_prompt
        return SlashResult(
            f"system prompt: {prompt}" if prompt else "system prompt: none set; the chat template's own is used"
        )
    context.engine.set_system_prompt("" if argument.lower() == "none" else argument)
    return SlashResult()


def _live_settings() -> list[str]:
    return [name for name in setting_fields() if spec_of(name).live]


def _set(context: SlashContext, argument: str) -> SlashResult:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.strip().lower().replace("-", "_"), value.strip()
    settings = context.engine.settings
    if not name:
        rows = [f"{key} = {getattr(settings, key)}  ({spec_of(key).legal()})" for key in _live_settings()]
        return SlashResult("\n".join(rows))
    if name not in setting_fields():
        return SlashResult(f"{name} is not a setting; /set lists those that can be changed here", error=True)
    if not value:
        return SlashResult(f"{name} = {getattr(settings, name)}  ({spec_of(name).help}; {spec_of(name).legal()})")
    if not spec_of(name).live:
        return SlashResult(
            f"{name} cannot change during a chat; start with {config.flag_of(name)} or put it into config.toml",
            error=True,
        )
    checked = config.check_value(name, config.parse_text(name, value, "/set"), "/set")
    context.engine.set_option(name, checked)
    return SlashResult(f"{name} = {checked} from the next turn on")


def _complete_set(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    name, space, _ = argument.partition(" ")
    settings = context.engine.settings
    if not space:
        return [(key, f"now {getattr(settings, key)}") for key in _live_settings() if key.startswith(name)]
    return []


def _stats(context: SlashContext, argument: str) -> SlashResult:
    board = context.board
    cache = board.cache
    rows: list[tuple[str, str]] = []
    if board.info is not None:
        info = board.info
        rows.append(
            (
                "model",
                f"{info.name} ({info.dtype} on {info.device}, {human_bytes(info.weight_bytes)} of weights)",
            )
        )
    parts = f"{cache.sinks} sinks, {cache.pinned} pinned, {cache.window} window"
    rows.append(("cache length", f"{cache.length} / {cache.cache_size} tokens ({parts})"))
    rows.append(("compressions", f"{cache.compressions} ({cache.tokens_evicted} tokens evicted)"))
    rows.append(
        (
            "KV cache",
            f"{human_bytes(cache.kv_bytes)} (a full cache would need {human_bytes(cache.full_kv_bytes)})",
        )
    )
    rows += memory_figures(board.memory)
    rows.append(("turns", f"{board.turns} ({board.prompt_tokens} tokens read, {board.new_tokens} written)"))
    if board.ttft_s is not None:
        rows.append(("first token", human_seconds(board.ttft_s)))
    if board.decode_tps is not None:
        rows.append(("speed", f"{board.decode_tps:.1f} tok/s"))
    width = max(len(label) for label, _ in rows)
    return SlashResult("\n".join(f"{label:<{width}}  {value}" for label, value in rows))
