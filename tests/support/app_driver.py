"""Drives the Textual app with the scripted engine: waits on conditions, never on times."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from textual.pilot import Pilot
from textual.screen import Screen

from streamchat.base import events as ev
from streamchat.base.requests import Request
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.engine import Engine
from streamchat.frontend.status import StatusBoard
from streamchat.tui.app import StreamchatApp
from streamchat.tui.screens.chat import ChatScreen
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.lines import CommandOutput, EvictionLine, Line
from streamchat.tui.widgets.prompt import Prompt
from streamchat.tui.widgets.status_panel import StatusPanel
from streamchat.tui.widgets.turn import Turn
from tests.support.scripted_engine import ScriptedEngine

E = TypeVar("E", bound=ev.Event)
R = TypeVar("R", bound=Request)
NASTY = "arr[0] = [/INST] [bold] [/usr/bin/x] [red"


class Driver:
    """One running app."""

    def __init__(self, app: StreamchatApp, engine: ScriptedEngine | Engine, pilot: Pilot[int]) -> None:
        self.app, self._engine, self.pilot = app, engine, pilot

    @property
    def engine(self) -> ScriptedEngine:
        assert isinstance(self._engine, ScriptedEngine)
        return self._engine

    @property
    def real_engine(self) -> Engine:
        assert isinstance(self._engine, Engine)
        return self._engine

    @property
    def chat(self) -> ChatScreen:
        return self.app._chat

    @property
    def board(self) -> StatusBoard:
        return self.app.state.board

    @property
    def conversation(self) -> Conversation:
        return self.chat.query_one(Conversation)

    @property
    def prompt(self) -> Prompt:
        return self.chat.query_one(Prompt)

    @property
    def sidebar(self) -> StatusPanel:
        return self.chat.query_one(StatusPanel)

    @property
    def turns(self) -> list[Turn]:
        return self.conversation.turns

    def shows(self, kind: type[Screen[Any]]) -> bool:
        """Whether the screen in front is of this class."""
        return isinstance(self.app.screen, kind)

    def figures(self, section: str) -> dict[str, str]:
        return self.sidebar.figures(section)

    @property
    def lines(self) -> list[str]:
        """Sentences of the program in the conversation."""
        return [line.text for line in self.conversation.query(Line)]

    @property
    def evictions(self) -> list[str]:
        return [line.text for line in self.conversation.query(EvictionLine)]

    @property
    def outputs(self) -> list[str]:
        """Answers of slash commands."""
        return [output.text for output in self.conversation.query(CommandOutput)]

    @property
    def toasts(self) -> list[str]:
        return [toast.message for toast in self.app._notifications]

    @property
    def screen_text(self) -> str:
        """What is on the screen, as text."""
        strips = self.app.screen._compositor.render_strips()
        return "\n".join(strip.text for strip in strips)

    async def until(self, condition: Callable[[], Any], what: str = "", timeout_s: float = 15.0) -> None:
        """Wait for `condition`."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"timed out waiting{' for ' + what if what else ''}; screen:\n{self.screen_text}")
            await asyncio.sleep(0.01)
        await self.pilot.pause()

    async def answered(self, number: int, timeout_s: float = 15.0) -> None:
        """Wait for the end of turn `number`."""
        board = self.board
        await self.until(lambda: board.turns == number and not board.busy, f"the end of turn {number}", timeout_s)

    async def ready(self) -> None:
        await self.until(lambda: self.board.info is not None, "the model")

    async def write(self, text: str) -> None:
        """Put `text` into the input at once, as if typed."""
        self.prompt.insert(text)
        await self.pilot.pause()

    async def enter(self, text: str) -> None:
        """Type `text` and press Enter."""
        await self.write(text)
        if self.chat.query_one("#completions").display:
            await self.pilot.press("escape")
        await self.pilot.press("enter")

    async def begin(self, text: str) -> None:
        """Send the first message and wait for the first word of its reply."""
        await self.enter(text)
        await self.until(lambda: self.turns and self.turns[0].reply_text)

    async def ask(self, text: str) -> Turn:
        """Send a message and wait for the end of its turn."""
        done = self.finished
        await self.enter(text)
        await self.until(lambda: self.finished > done, f"the end of the turn {text!r}")
        return self.turns[-1]

    @property
    def finished(self) -> int:
        """Turns whose end the app has shown."""
        return self.board.turns

    def emitted(self, kind: type[E]) -> list[E]:
        return [event for event in self.engine.events if isinstance(event, kind)]

    def sent(self, kind: type[R]) -> list[R]:
        return [request for request in self.engine.sent if isinstance(request, kind)]


@asynccontextmanager
async def driving(
    engine: ScriptedEngine | Engine,
    *,
    settings: Settings | None = None,
    size: tuple[int, int] = (140, 40),
    ready: bool = True,
) -> AsyncIterator[Driver]:
    """Run the app with `engine`; closes both."""
    app = StreamchatApp(engine, Configuration(settings or engine.settings))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gc, "freeze", lambda: None)  # the app and its widgets would never be collected
            async with app.run_test(size=size, notifications=True) as pilot:
                driver = Driver(app, engine, pilot)
                if ready:
                    await driver.ready()
                yield driver
    finally:
        assert engine.close(60)
