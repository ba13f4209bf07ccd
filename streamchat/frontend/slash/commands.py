"""The slash commands that every front end has."""

from __future__ import annotations

from streamchat.frontend.slash.branches import FORK, REWIND
from streamchat.frontend.slash.conversation import CLEAR, SYSTEM
from streamchat.frontend.slash.detach import DETACH
from streamchat.frontend.slash.files import READ
from streamchat.frontend.slash.imports import IMPORT
from streamchat.frontend.slash.model import MODEL
from streamchat.frontend.slash.pins import PIN, UNPIN
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashRegistry, SlashResult
from streamchat.frontend.slash.session_commands import SessionCommands
from streamchat.frontend.slash.settings import SET
from streamchat.frontend.slash.stats import STATS
from streamchat.frontend.slash.think import THINK
from streamchat.frontend.status_table import Row, rows_text


def default_registry() -> SlashRegistry:
    """A registry with the commands that every front end has, in the order of `/help`."""
    registry = SlashRegistry()
    for command in (_help_of(registry), CLEAR, SYSTEM, MODEL, PIN, UNPIN, READ, SET, THINK, STATS):
        registry.add(command)
    SessionCommands().add_to(registry)
    for command in (REWIND, FORK, IMPORT):
        registry.add(command)
    registry.add(DETACH)
    registry.add(
        SlashCommand("quit", "", "exit streamchat", lambda context, argument: SlashResult(quit=True), ("exit", "q"))
    )
    return registry


def _help_of(registry: SlashRegistry) -> SlashCommand:
    """The command `/help`, which lists the commands of `registry`."""

    def show_help(context: SlashContext, argument: str) -> SlashResult:
        if argument:
            command = registry.find(argument.lstrip("/").lower())
            if command is None:
                return SlashResult(f"/{argument.lstrip('/')} is not a command; /help lists them", error=True)
            return SlashResult(f"{command.usage}  {command.help}")
        return SlashResult(rows_text(Row(command.usage, command.help) for command in registry))

    def complete_help(context: SlashContext, argument: str) -> list[tuple[str, str]]:
        return [(c.name, c.help) for c in registry if c.name.startswith(argument)]

    return SlashCommand("help", "[COMMAND]", "list the commands, or describe one", show_help, ("h", "?"), complete_help)
