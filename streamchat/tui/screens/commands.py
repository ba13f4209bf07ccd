"""The part of the chat screen that runs slash commands, and opens the lists of sessions and messages."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from textual import on

from streamchat.base.requests import Quote, Stop
from streamchat.base.sanitize import without_blank_ends
from streamchat.frontend.messages import QUOTE_REPLY, quote_prompt
from streamchat.frontend.outbox import Phase
from streamchat.frontend.slash.registry import SlashCommand, SlashResult, parse
from streamchat.frontend.slash.session_commands import turn_done, turn_here
from streamchat.tui.screens.finder import RecallChoice, RecallScreen, SessionsScreen
from streamchat.tui.screens.help import HelpScreen
from streamchat.tui.screens.sending import SendingScreen
from streamchat.tui.screens.settings import SettingsScreen
from streamchat.tui.widgets.lines import CommandOutput
from streamchat.tui.widgets.prompt import Prompt

if TYPE_CHECKING:
    from streamchat.models.choices import ModelChoice


class CommandScreen(SendingScreen):
    """A screen that runs commands and shows their results."""

    @on(Prompt.Submitted)
    async def _submitted(self, message: Prompt.Submitted) -> None:
        message.stop()
        typed = without_blank_ends(message.text)
        if parse(typed) is not None:
            await self.end_edit(empty=False)  # the input may have the start of the next message
            if self._is_slow(typed):
                self.run_slash(typed.strip())  # the screen stays usable meanwhile
                done = True
            else:
                done = await self._run(typed.strip())
        else:
            done = await self.send(typed, self.state.registry.unescape(typed))
        if done:
            self.state.history.add(message.text)
        else:
            self.prompt.restore_text(message.text)

    def _is_slow(self, typed: str) -> bool:
        parsed = parse(typed)
        command = self.state.registry.find(parsed[0]) if parsed else None
        return command is not None and command.slow

    def run_slash(self, text: str) -> None:
        """Run a command as if the user had typed it."""
        self.run_worker(self._run(text))

    async def _run(self, text: str) -> bool:
        """Run the command in `text`; on failure shows a toast and returns False."""
        await self.end_edit()
        parsed = parse(text)
        assert parsed is not None
        name, argument = parsed
        command = self.state.registry.find(name)
        if command is not None and not self._is_available(command, argument):
            return False
        if command is not None and command.slow:
            self.toast(f"/{command.name} is running", "information")
            result = await asyncio.to_thread(self.state.registry.run, self.state.context, text)
        else:
            result = self.state.registry.run(self.state.context, text)
        assert result is not None
        if result.error:
            self.toast(result.text, "error")
            return False
        if result.message:
            return await self.send(text, result.message)
        if command is not None and command.asks_engine and not result.text and self._outbox.phase is Phase.REPLYING:
            self.toast(f"/{command.name} takes effect when this reply is done", "information")
        await self._show_result(text, result)
        return True

    def _is_available(self, command: SlashCommand, argument: str) -> bool:
        """Whether the command can run now. One that starts over stops the reply, and what is queued is held."""
        phase, starts_over = self._outbox.phase, command.starts_over(argument)
        if phase is Phase.FAILED and (starts_over or command.asks_engine or command.changes_engine(argument)):
            self.refuse()
            return False
        if command.needs_idle and phase is not Phase.IDLE:
            why = "the model is not ready yet" if phase is Phase.LOADING else "a reply is in progress"
            self.toast(f"/{command.name} is not available: {why}", "warning")
            return False
        if starts_over and phase is Phase.REPLYING:
            self.hold()
            self.state.engine.send(Stop())  # otherwise the reply would be completed first
        return True

    async def _show_result(self, text: str, result: SlashResult) -> None:
        if result.done_when is not None:
            self._outbox.begin_command(result.done_when)
        if result.insert:
            self.prompt.restore_text(result.insert)
        if result.text:
            await self.conversation.add(CommandOutput(text, result.text))
            self.conversation.follow()
        if result.quit:
            await self.app.action_quit()
        await self.advance()

    # --- other screens; an app that only watches opens no lists ---------------------------------------------------

    def action_open_help(self) -> None:
        """Show keys and commands."""
        if self.is_active:
            self.app.push_screen(HelpScreen(self.state.registry, self.state.configuration.keys))

    def action_sessions(self, words: str = "") -> None:
        """Choose a session to resume."""

        def resume(session: str | None) -> None:
            if session is not None:
                self.run_slash(f"/resume {session}")

        if not self.state.watching:
            self.app.push_screen(SessionsScreen(words, self.state.board.session), resume)

    def action_models(self, words: str = "") -> None:
        """Choose a model to load; one that must be fetched is fetched while the chat continues."""

        from streamchat.tui.screens.models import ModelsScreen  # not at the start of the app

        def load(choice: ModelChoice | None) -> None:
            if choice is not None:
                self.run_slash(f"/model {choice.name}")

        if not self.state.watching:
            info = self.state.board.info
            self.app.push_screen(ModelsScreen(lambda: self.state.find_models(info), words), load)

    def action_settings(self, words: str = "") -> None:
        """Show and change all settings."""
        if self.is_active and not self.state.watching:
            screen = SettingsScreen(self.state.settings, lambda: self._outbox.phase is not Phase.FAILED, words)
            self.app.push_screen(screen)

    def action_recall(self, words: str = "") -> None:
        """Search all messages and quote one to the model."""
        if not self.state.watching:
            thinking = self.state.engine.settings.thinking
            self.app.push_screen(RecallScreen(words, self.state.board.session, thinking), self._quote)

    def _quote(self, choice: RecallChoice | None) -> None:
        if choice is None:
            return
        if self._outbox.phase is not Phase.IDLE:
            self.toast("the model is busy; try again when it is ready", "warning")
            return
        self._outbox.begin_command(turn_done)
        text = quote_prompt(choice.found, time.time())
        keep = choice.action == "keep"
        turn = turn_here(choice.found, self.state.board.session) if keep else 0
        self.state.engine.send(Quote(text, QUOTE_REPLY, keep, turn))
        self.show_keys()
