"""Opens the lists of sessions and messages, and acts on what the user chooses there."""

from __future__ import annotations

import time

from streamchat.base.requests import Quote
from streamchat.frontend.messages import QUOTE_REPLY, quote_prompt
from streamchat.frontend.outbox import Outbox, Phase
from streamchat.frontend.slash.session_commands import turn_done
from streamchat.tui.host import ChatView
from streamchat.tui.screens.finder import RecallChoice, RecallScreen, SessionsScreen


class Finders:
    """The two lists of a chat. An app that only watches does not open them."""

    def __init__(self, outbox: Outbox, view: ChatView) -> None:
        self._host, self._outbox, self._view = view.chat_app, outbox, view

    def sessions(self, words: str = "") -> None:
        """Choose a session to resume."""

        def resume(session: str | None) -> None:
            if session is not None:
                self._view.run_slash(f"/resume {session}")

        if not self._host.watching:
            self._view.app.push_screen(SessionsScreen(words, self._host.board.session), resume)

    def recall(self, words: str = "") -> None:
        """Search all messages and quote one to the model."""
        if self._host.watching:
            return
        thinking = self._host.engine.settings.thinking
        self._view.app.push_screen(RecallScreen(words, self._host.board.session, thinking), self._quote)

    def _quote(self, choice: RecallChoice | None) -> None:
        if choice is None:
            return
        if self._outbox.phase is not Phase.IDLE:
            self._view.toast("the model is busy; try again when it is ready", "warning")
            return
        self._outbox.begin_command(turn_done)
        text = quote_prompt(choice.found, time.time())
        self._host.engine.send(Quote(text, QUOTE_REPLY, choice.action == "keep"))
        self._view.show_keys()
