"""Slash commands of the full-screen app, added to the shared registry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Protocol

from streamchat.base.formatting import plural
from streamchat.frontend import file_access
from streamchat.frontend.outbox import Outbox
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.queue import queue_command
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashRegistry, SlashResult
from streamchat.frontend.slash.session_commands import SessionCommands


class AppActions(Protocol):
    """App actions that the commands need."""

    def themes(self) -> list[str]:
        """Names of all themes."""
        ...

    def theme_name(self) -> str:
        """Name of the current theme."""
        ...

    def use_theme(self, name: str) -> str:
        """Switch to an existing theme; returns a note about the next start."""
        ...

    def copy_reply(self, code_only: bool) -> str:
        """Copy the last reply, or its last code block; returns a message."""
        ...

    def toggle_sidebar(self) -> None:
        """Show or hide the sidebar."""
        ...

    def action_open_help(self) -> None:
        """Show the help screen."""
        ...

    def open_sessions(self, words: str) -> None:
        """Show the sessions that match `words`."""
        ...

    def open_recall(self, words: str) -> None:
        """Show the messages that match `words`."""
        ...

    def download(self, name: str, text: str) -> None:
        """Offer `text` to the browser as a download named `name`."""
        ...


def app_registry(actions: AppActions, outbox: Outbox) -> SlashRegistry:
    """The shared commands and those of the app, in one registry."""
    registry = default_registry()
    shared_help = registry.find("help")
    assert shared_help is not None

    def show_help(context: SlashContext, argument: str) -> SlashResult:
        if argument:
            return shared_help.run(context, argument)
        actions.action_open_help()
        return SlashResult()

    def theme(context: SlashContext, argument: str) -> SlashResult:
        name = argument.lower()
        if not name:
            return SlashResult(f"theme: {actions.theme_name()}; available: {', '.join(actions.themes())}")
        if name not in actions.themes():
            return SlashResult(unknown_theme(name, actions.themes()), error=True)
        return SlashResult(f"theme: {name}, {actions.use_theme(name)}")

    def complete_theme(context: SlashContext, argument: str) -> Iterable[tuple[str, str]]:
        now = actions.theme_name()
        return [(name, "now" if name == now else "") for name in actions.themes() if name.startswith(argument.lower())]

    def copy(context: SlashContext, argument: str) -> SlashResult:
        if argument not in ("", "code"):
            return SlashResult("usage: /copy, or /copy code for the last code block", error=True)
        return SlashResult(actions.copy_reply(code_only=argument == "code"))

    def complete_copy(context: SlashContext, argument: str) -> Iterable[tuple[str, str]]:
        return [("code", "only the last code block")] if "code".startswith(argument) else []

    def sidebar(context: SlashContext, argument: str) -> SlashResult:
        actions.toggle_sidebar()
        return SlashResult()

    def sessions(context: SlashContext, argument: str) -> SlashResult:
        actions.open_sessions(argument)
        return SlashResult()

    def recall(context: SlashContext, argument: str) -> SlashResult:
        actions.open_recall(argument)
        return SlashResult()

    def export(context: SlashContext, argument: str) -> SlashResult:
        path, text, turns, lost = SessionCommands().exported(context, argument)
        actions.download(path.name, text)
        return SlashResult(f"{path.name} ({plural(turns, 'turn')}) was sent to the browser{lost}")

    if not file_access.allowed():
        registry.add(SlashCommand("export", "[NAME]", "download the conversation: .md, .jsonl or .json", export))
    registry.add(SlashCommand("sessions", "[WORDS]", "find and resume a saved conversation", sessions))
    registry.add(SlashCommand("recall", "[WORDS]", "search all messages and quote one to the model", recall, ("find",)))
    registry.add(
        SlashCommand(
            "help", "[COMMAND]", "show keys and commands", show_help, shared_help.aliases, shared_help.complete
        )
    )
    registry.add(queue_command(outbox))
    registry.add(SlashCommand("theme", "[NAME]", "show or change the color theme", theme, (), complete_theme))
    registry.add(SlashCommand("copy", "[code]", "copy the last reply, or its last code block", copy, (), complete_copy))
    registry.add(SlashCommand("sidebar", "", "show or hide the status panel", sidebar))
    return registry


def unknown_theme(name: str, themes: list[str]) -> str:
    """Message for an unknown theme, with similar names."""
    close = difflib.get_close_matches(name, themes) or themes[:4]
    return f"theme {name!r} does not exist; try {', '.join(close)} (/theme lists all themes)"
