"""Browser tabs: each runs the app in a separate process, and resumes its session after a reload.

A page keeps a key for its tab. The process reports the id of its saved session (`SESSION_META`), which is stored under
that key, so that the next process of the tab can resume it, even after a restart of the server.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textual_serve.app_service import AppService

from streamchat.base import paths
from streamchat.base.atomic_files import read_json, save_result
from streamchat.web.launch import SESSION_META

KEY = re.compile(r"[A-Za-z0-9_-]{16,64}")
"""Valid keys of tabs."""
MAX_KNOWN = 256
"""Maximum number of tabs whose sessions are stored; the oldest are dropped."""


class Tab(AppService):
    """The process of a tab.

    Args:
        command: Shell command that runs the app.
        on_session: Called with the id of the saved session, or None when the conversation has none.
        write_bytes: Sends bytes to the page.
        write_str: Sends text to the page.
        rest: Passed on to `AppService`.
    """

    def __init__(
        self,
        command: str,
        on_session: Callable[[str | None], None],
        write_bytes: Callable[[bytes], Awaitable[None]],
        write_str: Callable[[str], Awaitable[None]],
        **rest: Any,
    ) -> None:
        super().__init__(
            command, write_bytes=_unless_page_left(write_bytes), write_str=_unless_page_left(write_str), **rest
        )
        self._on_session = on_session
        self.has_drawn = False
        """Whether the app has started to draw."""

    async def run(self) -> None:
        """Run the process until it has exited, then close the connection of the page.

        The process closes its output first, and exits after its conversation is saved.
        """
        await super().run()
        if _is_cancelled():
            return
        assert self._process is not None
        await self._process.communicate()
        await self.remote_close()

    async def on_data(self, payload: bytes) -> None:
        """Send the app's output to the page."""
        self.has_drawn = True
        await super().on_data(payload)

    async def on_meta(self, data: bytes) -> None:
        """Handle a message from the app to the server or the page."""
        message = json.loads(data)
        if message.get("type") == SESSION_META:
            self._on_session(message["session"])
        else:
            await super().on_meta(data)


def _unless_page_left(write: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Return a `write` that drops data after the page is closed.

    The output of the process must still be read: otherwise it would wait for a reader, and could not save and exit.
    """

    async def write_or_drop(data: Any) -> None:
        with suppress(ConnectionError):
            await write(data)

    return write_or_drop


def _is_cancelled() -> bool:
    """Return whether the current task was cancelled; `AppService.run` returns instead of raising then."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@dataclass
class _Use:
    """A connection that uses a key."""

    close: Callable[[], Awaitable[Any]]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class KnownTabs:
    """The session of each tab, stored in a file.

    Args:
        file: Written when a tab's session changes.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        kept = read_json(file)
        self._sessions = {key: each for key, each in kept.items() if KEY.fullmatch(key) and isinstance(each, str)}
        self._uses: dict[str, _Use] = {}

    def session(self, key: str) -> str | None:
        """Return the session of a tab; None if it had none."""
        return self._sessions.get(key)

    def remember(self, key: str, session: str | None) -> None:
        """Store the session of a tab; None removes it."""
        if not key or self._sessions.get(key) == session:
            return
        self._sessions.pop(key, None)
        if session is not None:
            self._sessions[key] = session
        while len(self._sessions) > MAX_KNOWN:
            del self._sessions[next(iter(self._sessions))]
        paths.private_dir(self._file.parent)
        save_result(self._file, dict(self._sessions), "the sessions of browser tabs")

    @asynccontextmanager
    async def use(self, key: str, close: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
        """Context manager: hold `key` exclusively, after another connection with the same key is closed and has ended.

        After a reload, the new page connects before the server notices that the old one is closed. A duplicated tab has
        the key of its original.

        Args:
            key: Key of the tab; '' excludes no other connection.
            close: Closes the connection of the caller.
        """
        mine = _Use(close)
        while key and (other := self._uses.get(key)) is not None:
            await other.close()
            await other.ended.wait()
        if key:
            self._uses[key] = mine
        try:
            yield
        finally:
            if key:
                del self._uses[key]
            mine.ended.set()
