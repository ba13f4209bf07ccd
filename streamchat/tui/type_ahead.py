"""Keys that are typed faster than dialogs open and close: each one waits until a dialog has handled the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from textual.app import App
from textual.events import Event
from textual.message_pump import MessagePump
from textual.timer import Timer

from streamchat.tui.screens.closable import Closable

LIMIT_S = 3.0
"""Longest wait for a dialog to handle a key. A dialog that needs longer gets the next keys as they come."""


class TypeAhead:
    """Passes keys and pastes on in order. Only the task of `app` calls it.

    Textual forwards a key to the widget that has the focus at that moment. While a dialog opens, no widget has it, and
    the key would be lost. While a dialog closes, a widget of the dialog still has it: Enter or Escape are on their way
    through the widgets, and the next key would be lost with the dialog.

    Args:
        app: The app.
        handle: Handles a key or a paste.
    """

    def __init__(self, app: App[Any], handle: Callable[[Event], Awaitable[None]]) -> None:
        self._app, self._handle = app, handle
        self._waiting: deque[Event] = deque()
        self._limit: Timer | None = None
        """Runs while a dialog handles an event, or opens."""

    async def put(self, event: Event) -> None:
        """Handle `event` now, or once the dialog in front has handled the events before it."""
        self._waiting.append(event)
        if self._limit is None:
            await self._pass_on()

    async def _pass_on(self) -> None:
        while self._waiting and self._limit is None and self._app.screen_stack:  # without a screen, the app has exited
            front = self._app.screen_stack[-1]
            if not isinstance(front, Closable):
                await self._handle(self._waiting.popleft())
                continue
            path: list[MessagePump] = [*(front.focused or front).ancestors_with_self]
            if front.is_mounted:
                await self._handle(self._waiting.popleft())
            self._wait(path)

    def _wait(self, path: Sequence[MessagePump]) -> None:
        limit: Timer
        self._limit = limit = self._app.set_timer(LIMIT_S, lambda: self._end_wait(limit))
        self._follow(path, limit)

    def _follow(self, path: Sequence[MessagePump], limit: Timer) -> None:
        """Wait until each of `path`, up to the app, has handled its messages so far; those that are gone have none."""
        for at, node in enumerate(path, 1):
            after = path[at:]
            if node.call_later(self._follow, after, limit) if after else node.call_later(self._end_wait, limit):
                return

    async def _end_wait(self, limit: Timer) -> None:
        if limit is self._limit:
            limit.stop()
            self._limit = None
            await self._pass_on()
