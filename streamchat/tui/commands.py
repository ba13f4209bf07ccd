"""Slash commands of the full-screen app, added to the shared registry."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from typing import Any

from textual.app import App

from streamchat.base.errors import ModelError
from streamchat.base.formatting import plural
from streamchat.frontend import file_access
from streamchat.frontend.slash.model import MODEL, require_allowed
from streamchat.frontend.slash.queue import queue_command
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult
from streamchat.frontend.slash.session_commands import SessionCommands
from streamchat.models.fetch import must_be_fetched
from streamchat.tui.screens.commands import CommandScreen
from streamchat.tui.themes import unknown_theme, use_theme


def add_app_commands(app: App[Any], chat: CommandScreen) -> None:
    """Add the commands of the app to the registry of its chat, or replace the shared ones."""
    registry = chat.state.registry
    shared_help = registry.find("help")
    assert shared_help is not None

    def show_help(context: SlashContext, argument: str) -> SlashResult:
        if argument:
            return shared_help.run(context, argument)
        chat.action_open_help()
        return SlashResult()

    def theme(context: SlashContext, argument: str) -> SlashResult:
        name = argument.lower()
        if not name:
            return SlashResult(f"theme: {app.theme}; available: {', '.join(sorted(app.available_themes))}")
        if name not in app.available_themes:
            return SlashResult(unknown_theme(name, app.available_themes), error=True)
        return SlashResult(f"theme: {name}, {use_theme(app, name, chat.state.configuration)}")

    def complete_theme(context: SlashContext, argument: str) -> Iterable[tuple[str, str]]:
        names = [name for name in sorted(app.available_themes) if name.startswith(argument.lower())]
        return [(name, "now" if name == app.theme else "") for name in names]

    def copy(context: SlashContext, argument: str) -> SlashResult:
        if argument not in ("", "code"):
            return SlashResult("usage: /copy, or /copy code for the last code block", error=True)
        return SlashResult(chat.copy_reply(code_only=argument == "code"))

    def complete_copy(context: SlashContext, argument: str) -> Iterable[tuple[str, str]]:
        return [("code", "only the last code block")] if "code".startswith(argument) else []

    def sidebar(context: SlashContext, argument: str) -> SlashResult:
        chat.action_toggle_sidebar()
        return SlashResult()

    def sessions(context: SlashContext, argument: str) -> SlashResult:
        chat.action_sessions(argument)
        return SlashResult()

    def model(context: SlashContext, argument: str) -> SlashResult:
        if not argument:
            chat.action_models()
            return SlashResult()
        require_allowed(context, argument)
        try:
            if not must_be_fetched(argument):
                chat.state.switch.load(argument)
            elif not chat.state.switch.is_fetching(argument):
                chat.state.switch.fetch(argument)
        except ModelError as error:
            return SlashResult(f"{error}; keeping the current model", error=True)
        chat.show_keys()
        return SlashResult()

    def starts_over(argument: str) -> bool:
        with suppress(ModelError):
            return bool(argument) and not must_be_fetched(argument)
        return False

    def recall(context: SlashContext, argument: str) -> SlashResult:
        chat.action_recall(argument)
        return SlashResult()

    def settings(context: SlashContext, argument: str) -> SlashResult:
        chat.action_settings(argument)
        return SlashResult()

    def export(context: SlashContext, argument: str) -> SlashResult:
        path, text, turns, lost = SessionCommands().exported(context, argument)
        app.deliver_text(StringIO(text), save_filename=path.name)
        return SlashResult(f"{path.name} ({plural(turns, 'turn')}) was sent to the browser{lost}")

    if not file_access.allowed():
        registry.add(SlashCommand("export", "[NAME]", "download the conversation: .md, .html, .jsonl or .json", export))
    registry.add(SlashCommand("sessions", "[WORDS]", "find and resume a saved conversation", sessions))
    registry.add(SlashCommand("recall", "[WORDS]", "search all messages and quote one to the model", recall, ("find",)))
    registry.add(
        SlashCommand(
            "help", "[COMMAND]", "show keys and commands", show_help, shared_help.aliases, shared_help.complete
        )
    )
    registry.add(replace(MODEL, run=model, starts_over=starts_over, help="choose a model and start over with it"))
    registry.add(SlashCommand("settings", "[WORDS]", "show and change all settings", settings))
    registry.add(queue_command(chat.state.outbox))
    registry.add(SlashCommand("theme", "[NAME]", "show or change the color theme", theme, (), complete_theme))
    registry.add(SlashCommand("copy", "[code]", "copy the last reply, or its last code block", copy, (), complete_copy))
    registry.add(SlashCommand("sidebar", "", "show or hide the status panel", sidebar))
