"""Slash commands that only the full-screen app has, on top of the shared registry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Protocol

from streamchat.base.formatting import plural
from streamchat.frontend import file_access
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashRegistry, SlashResult
from streamchat.frontend.slash.session_commands import SessionCommands


class AppActions(Protocol):
    """What the commands do to the app."""

    def themes(self) -> list[str]:
        """Names of all themes."""
        ...

    def theme_name(self) -> str:
        """Name of the theme in use."""
        ...

    def use_theme(self, name: str) -> str:
        """Switch to the theme `name`, which exists; returns what the next start does."""
        ...

    def copy_reply(self, code_only: bool) -> str:
        """Copy the last reply, or its last code block; returns what to tell."""
        ...

    def toggle_sidebar(self) -> None:
        """Show or hide the sidebar."""
        ...

    def open_help(self) -> None:
        """Show the help screen."""
        ...

    def open_sessions(self, words: str) -> None:
        """Show the saved conversations that have `words`."""
        ...

    def open_recall(self, words: str) -> None:
        """Show the messages that have `words`."""
        ...

    def download(self, name: str, text: str) -> None:
        """Have the browser save `text` under `name`."""
        ...


def app_registry(actions: AppActions) -> SlashRegistry:
    """The shared commands and those of the app."""
    registry = default_registry()
    shared_help = registry.find("help")
    assert shared_help is not None

    def show_help(context: SlashContext, argument: str) -> SlashResult:
        if argument:
            return shared_help.run(context, argument)
        actions.open_help()
        return SlashResult()

    def theme(context: SlashContext, argument: str) -> SlashResult:
        name = argument.lower()
        if not name:
            return SlashResult(f"theme: {actions.theme_name()}; others: {', '.join(actions.themes())}")
        if name not in actions.themes():
            return SlashResult(unknown_theme(name, actions.themes()), error=True)
        return SlashResult(f"theme: {name}, {actions.use_theme(name)}")

    def complete_theme(context: SlashContext, argument: str) -> Iterable[tuple[str, str]]:
        now = actions.theme_name()
        return [(name, "now" if name == now else "") for name in actions.themes() if name.startswith(argument.lower())]

    def copy(context: SlashContext, argument: str) -> SlashResult:
        if argument not in ("", "code"):
            return SlashResult("/copy takes nothing, or the word code for the last code block", error=True)
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
        return SlashResult(f"{path.name} with {plural(turns, 'turn')} goes to the browser{lost}")

    if not file_access.allowed():
        registry.add(SlashCommand("export", "[NAME]", "download the conversation: .md, .jsonl or .json", export))
    registry.add(SlashCommand("sessions", "[WORDS]", "find a saved conversation and go on with it", sessions))
    registry.add(
        SlashCommand("recall", "[WORDS]", "find what was said, and put it before the model again", recall, ("find",))
    )
    registry.add(
        SlashCommand("help", "[COMMAND]", "keys and commands", show_help, shared_help.aliases, shared_help.complete)
    )
    registry.add(SlashCommand("theme", "[NAME]", "show or change the colour theme", theme, (), complete_theme))
    registry.add(SlashCommand("copy", "[code]", "copy the last reply, or its last code block", copy, (), complete_copy))
    registry.add(SlashCommand("sidebar", "", "show or hide the status panel", sidebar))
    return registry


def unknown_theme(name: str, themes: list[str]) -> str:
    """What to say about a theme that does not exist."""
    close = difflib.get_close_matches(name, themes, n=3) or themes[:4]
    return f"there is no theme {name!r}; there are {', '.join(close)} and others (/theme lists them)"
