"""Brings the news of a call from the model's thread to the event loop, and from there to the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from streamchat.server.calls import Call, Ended, News, Prompt
from streamchat.server.errors import ApiError
from streamchat.server.model_thread import ModelThread

PING_S = 15.0
"""After this time without news a stream gets a comment, so that nothing between here and the client closes it."""
PING = b": waiting\n\n"


class Reply:
    """The reply to one request. Used on the event loop's thread.

    Args:
        model: The model's thread.
        prompt: What the request asks.
        seconds: After this time the reply is stopped.
    """

    def __init__(self, model: ModelThread, prompt: Prompt, seconds: float) -> None:
        self._model, self._seconds = model, seconds
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._call = Call(prompt, self._report)
        self._has_ended = self._is_late = False

    @property
    def created(self) -> float:
        """When the request came, in seconds since 1970."""
        return self._call.created

    @asynccontextmanager
    async def running(self, receive: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
        """Run the call for the length of the block; stop it if the client is gone, or the block ends early.

        Args:
            receive: Receives what the client sends, the body of the request excepted.
        """
        timer = self._loop.call_later(self._seconds, self._stop_late)
        watcher = asyncio.create_task(self._stop_if_gone(receive))
        self._model.submit(self._call)
        try:
            yield
        finally:
            timer.cancel()
            watcher.cancel()
            if not self._has_ended:
                self._model.cancel(self._call)

    async def news(self) -> AsyncIterator[News | None]:
        """Yield the news up to the end or an error; None after `PING_S` without any."""
        while True:
            try:
                async with asyncio.timeout(PING_S):
                    news = await self._news.get()
            except TimeoutError:
                yield None
                continue
            self._has_ended = isinstance(news, Ended | ApiError)
            if isinstance(news, ApiError) and self._is_late:
                news = ApiError(504, f"no reply within {self._seconds:g} s; try again later", code="timeout")
            yield news
            if self._has_ended:
                return

    async def _stop_if_gone(self, receive: Callable[[], Awaitable[Any]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._model.cancel(self._call)

    def _stop_late(self) -> None:
        self._is_late = True
        self._model.cancel(self._call)

    def _report(self, news: News) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)
