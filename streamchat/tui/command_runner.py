"""Runs slash commands in the app."""

from __future__ import annotations

from streamchat.base.requests import Stop
from streamchat.frontend.outbox import Outbox, Phase
from streamchat.frontend.slash import registry
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult
from streamchat.tui.host import ChatView
from streamchat.tui.sender import Sender
from streamchat.tui.widgets.lines import CommandOutput


class CommandRunner:
    """Runs commands and shows their results.

    Args:
        sender: Sends the messages of commands, and follows the queue.
    """

    def __init__(self, outbox: Outbox, sender: Sender, view: ChatView) -> None:
        self._app, self._outbox, self._sender, self._view = view.chat_app, outbox, sender, view

    async def run(self, text: str) -> bool:
        """Run the command in `text`; on failure shows a toast and returns False."""
        await self._sender.end_edit()
        parsed = registry.parse(text)
        assert parsed is not None
        name, argument = parsed
        command = self._app.registry.find(name)
        if command is not None and not self._is_available(command, argument):
            return False
        result = self._app.registry.run(SlashContext(self._app.engine, self._app.board), text)
        assert result is not None
        if result.error:
            self._view.toast(result.text, "error")
            return False
        if result.message:
            return await self._sender.send(text, result.message)
        if command is not None and command.asks_engine and not result.text and self._outbox.phase is Phase.REPLYING:
            self._view.toast(f"/{command.name} takes effect when this reply is done", "information")
        await self._show(text, result)
        return True

    def _is_available(self, command: SlashCommand, argument: str) -> bool:
        """Whether the command can run now. One that starts over stops the reply, and what is queued is held."""
        phase, starts_over = self._outbox.phase, command.starts_over(argument)
        if phase is Phase.FAILED and (starts_over or command.asks_engine):
            self._sender.refuse()
            return False
        if command.needs_idle and phase is not Phase.IDLE:
            why = "the model is not ready yet" if phase is Phase.LOADING else "a reply is in progress"
            self._view.toast(f"/{command.name} is not available: {why}", "warning")
            return False
        if starts_over and phase is Phase.REPLYING:
            self._sender.hold()
            self._app.engine.send(Stop())  # otherwise the reply would be completed first
        return True

    async def _show(self, text: str, result: SlashResult) -> None:
        if result.done_when is not None:
            self._outbox.begin_command(result.done_when)
        if result.insert:
            self._view.prompt.restore_text(result.insert)
        if result.text:
            await self._view.conversation.add(CommandOutput(text, result.text))
            self._view.conversation.follow()
        if result.quit:
            await self._app.action_quit()
        await self._sender.advance()
