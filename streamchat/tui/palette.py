"""The command palette and its entries: actions with a key, and slash commands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from textual import work
from textual.app import App, ComposeResult, SystemCommand
from textual.await_complete import AwaitComplete
from textual.command import CommandList, CommandPalette
from textual.css.query import NoMatches

from streamchat.tui.bindings import hint
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.screens.closable import Closable
from streamchat.tui.widgets.option_list import Commands
from streamchat.tui.widgets.section import Section

UNDER_ANOTHER_NAME = {
    *("clear", "copy", "help", "model", "queue", "quit", "recall", "sessions", "settings", "sidebar", "theme"),
}
"""Slash commands that the palette already offers."""


class Palette(Closable, CommandPalette):
    """Textual's palette, which may be closed at any moment, and whose list may change at any moment."""

    def compose(self) -> ComposeResult:
        """The input above the list."""
        for widget in super().compose():
            yield Commands() if isinstance(widget, CommandList) else widget

    def dismiss(self, result: Any = None) -> AwaitComplete:
        """Close the palette."""
        self._stop_no_matches_countdown()
        return super().dismiss(result)

    @work(exclusive=True, group=CommandPalette._GATHER_COMMANDS_GROUP)
    async def _gather_commands(self, search_value: str) -> None:
        gather: Any = CommandPalette._gather_commands
        try:
            await gather.__wrapped__(self, search_value)
        except NoMatches:
            if not self.is_gone:
                raise


def palette_entries(app: App[Any], chat: ChatScreen) -> Iterable[SystemCommand]:
    """All entries; those that change the conversation are left out if the app only watches."""
    if not chat.state.watching:
        yield from _conversation_entries(app, chat)
    yield SystemCommand("Copy last reply", "To the terminal's clipboard", chat.action_copy_reply)
    yield SystemCommand("Copy last code block", "To the terminal's clipboard", chat.action_copy_code)
    yield SystemCommand("Context map", "Browse the model's context", chat.action_focus_map)
    yield SystemCommand("Sidebar", "Show or hide the status panel", chat.action_toggle_sidebar)
    for section in chat.query(Section):
        yield SystemCommand(f"Panel: {section.title}", "Collapse or expand", lambda s=section: s.fold(not s.folded))
    yield SystemCommand("Reasoning", "Expand or collapse the reasoning of replies", chat.action_toggle_thoughts)
    yield SystemCommand("Go to the end", "And follow the reply", chat.action_follow)
    yield SystemCommand("Theme", "Choose the color theme", app.action_change_theme)
    yield SystemCommand("Help", "Keys and commands", chat.action_open_help)
    yield SystemCommand("Screenshot", "Save the screen as SVG", lambda: app.set_timer(0.1, app.deliver_screenshot))
    if app._driver is not None and app._driver.can_suspend:
        yield SystemCommand("Suspend", "Suspend until the shell runs fg", app.action_suspend_process)
    yield SystemCommand("Quit", "Exit streamchat", app.action_quit)


def _conversation_entries(app: App[Any], chat: ChatScreen) -> Iterable[SystemCommand]:
    """Entries that change the conversation or the input."""
    yield SystemCommand("New conversation", "Start over; keep model and settings", lambda: chat.run_slash("/clear"))
    yield SystemCommand("Stop the reply", f"Same as {hint(app, 'chat.stop')}", chat.stop_reply)
    yield SystemCommand("Queue: remove the newest message", "Or the one being edited", chat.action_queue_drop)
    yield SystemCommand("Queue: remove all messages", "They stay in the input history", chat.action_queue_clear)
    yield SystemCommand("Recall", "Search all messages and quote one to the model", chat.action_recall)
    yield SystemCommand("Sessions", "Find and resume a saved conversation", chat.action_sessions)
    yield SystemCommand("Models", "Choose another model", chat.action_models)
    if chat.state.switch.is_active:
        yield SystemCommand("Cancel the fetch", chat.state.switch.text, chat.cancel_fetch)
    yield SystemCommand("Settings", "Show and change all settings", chat.action_settings)
    yield SystemCommand("Editor", "Write the message in $EDITOR", chat.action_edit)
    for command in chat.state.registry:
        # commands that need no argument and have no entry yet
        if command.arguments[:1] in ("", "[") and command.name not in UNDER_ANOTHER_NAME:
            yield SystemCommand(f"/{command.name}", command.help, lambda c=command: chat.run_slash(f"/{c.name}"))
