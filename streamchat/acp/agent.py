"""An agent of the protocol on one `Chat`: its sessions are saved sessions, of which one at a time is in the cache.

The chat works on a thread of its own; the connection stays responsive, so that a reply can be cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from acp import PROTOCOL_VERSION, RequestError
from acp.interfaces import Client
from acp.schema import (
    AgentCapabilities,
    Implementation,
    InitializeResponse,
    LoadSessionResponse,
    NewSessionResponse,
    PromptCapabilities,
    PromptResponse,
)

from streamchat import __version__
from streamchat.acp.blocks import STOP_REASONS, UpdateStream, history_updates, text_of, usage_of
from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, SessionError, StreamchatError
from streamchat.config.loader import Configuration
from streamchat.scripting.chat import Chat
from streamchat.sessions.recorder import title_of
from streamchat.sessions.settings import portable_model_name
from streamchat.store.records import ModelIdentity, NewSession
from streamchat.store.store import Store

T = TypeVar("T")
INVALID_PARAMS, INTERNAL_ERROR = -32602, -32603
ANSWER_S = 0.05
"""Time to answer `initialize` before loading the model slows this thread down."""
NEW_TITLE = "New conversation"


class StreamchatAgent:
    """Answers the requests of one client. Implements `acp.Agent`; the protocol's optional methods are absent.

    Args:
        configuration: All settings.
    """

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="streamchat-acp")
        self._loading: Future[Chat] | None = None
        self._client: Client | None = None
        self._turns = asyncio.Lock()
        """Held by the prompt that is in progress."""
        self._running = ""
        """The session of that prompt; '' for none."""
        self._waiting: list[str] = []
        """The sessions of the prompts that wait for the one in progress."""
        self._cancelled = set[str]()
        """Sessions whose prompt was cancelled and has not ended."""
        self._created: list[str] = []

    def on_connect(self, conn: Client) -> None:
        """Remember the client, which gets the updates."""
        self._client = conn

    async def initialize(self, protocol_version: int, *_: Any, **__: Any) -> InitializeResponse:
        """Return what this agent can do, then load the model."""
        asyncio.get_running_loop().call_later(ANSWER_S, self._load)
        return InitializeResponse(
            protocol_version=PROTOCOL_VERSION,
            agent_capabilities=AgentCapabilities(
                load_session=True, prompt_capabilities=PromptCapabilities(embedded_context=True)
            ),
            agent_info=Implementation(name="streamchat", title="streamchat", version=__version__),
        )

    async def new_session(self, cwd: str, *_: Any, **__: Any) -> NewSessionResponse:
        """Start a conversation, which is a saved session from its first turn on."""
        async with self._turns:
            session = await self._call(self._create)
        return NewSessionResponse(session_id=session)

    async def load_session(self, cwd: str, session_id: str, *_: Any, **__: Any) -> LoadSessionResponse:
        """Resume a saved session, and send its turns to the client."""
        async with self._turns:
            await self._call(lambda chat: chat.open(session_id))
            history, cache = await self._call(lambda chat: (chat.history, chat.status.cache))
            for update in history_updates(history):
                await self._send(session_id, update)
            await self._send(session_id, usage_of(cache.length, cache.cache_size))
        return LoadSessionResponse()

    async def prompt(self, session_id: str, prompt: list[Any], **_: Any) -> PromptResponse:
        """Send a message, stream the reply to the client, and return why it ended."""
        text = text_of(prompt)
        if not text.strip():
            raise RequestError(INVALID_PARAMS, "the prompt has no text")
        self._waiting.append(session_id)
        async with self._turns:
            self._waiting.remove(session_id)
            self._running = session_id
            try:
                return PromptResponse(stop_reason=await self._reply(session_id, text))  # type: ignore[arg-type]
            finally:
                self._running = ""
                self._cancelled.discard(session_id)

    async def cancel(self, session_id: str, **_: Any) -> None:
        """Stop the reply of a session, also one that waits; what was generated stays in the conversation."""
        if session_id != self._running and session_id not in self._waiting:
            return
        self._cancelled.add(session_id)
        if session_id == self._running and self._loading is not None and self._loading.done():
            with suppress(StreamchatError):
                self._loading.result().stop()

    async def _reply(self, session: str, text: str) -> str:
        loop = asyncio.get_running_loop()
        events = asyncio.Queue[ev.Event | None]()

        def run(chat: Chat) -> str:
            try:
                return self._run_turn(chat, session, text, lambda event: loop.call_soon_threadsafe(put, event))
            finally:
                loop.call_soon_threadsafe(put, None)

        put = events.put_nowait
        turn = asyncio.create_task(self._call(run))
        turn.add_done_callback(lambda _: put(None))  # also if the model could not be loaded
        stream = UpdateStream()
        while (event := await events.get()) is not None:
            for update in stream.updates_of(event):
                await self._send(session, update)
        return await turn

    def _run_turn(self, chat: Chat, session: str, text: str, emit: Callable[[ev.Event], object]) -> str:
        """Run one turn on the worker's thread; return why it ended."""
        if chat.session != session:
            chat.open(session)
        if session in self._created and not chat.history:
            with Store() as store:
                store.rename(session, title_of(text))
        stream = chat.send(text)
        for event in stream:
            emit(event)
            if session in self._cancelled:  # also if it was cancelled before the turn started
                chat.stop()
        assert stream.reply is not None
        return STOP_REASONS[stream.reply.finish_reason]

    def _create(self, chat: Chat) -> str:
        """Create a saved session without turns, and open it."""
        identity = ModelIdentity(portable_model_name(chat.settings.model), chat.status.model.name)
        with Store() as store:
            [session] = store.add([NewSession(NEW_TITLE, identity, {})])
        self._created.append(session)
        chat.open(session)
        return session

    def _load(self) -> Future[Chat]:
        """Start to load the model, if that has not started; return the chat of the future."""
        if self._loading is None:
            self._loading = self._worker.submit(Chat.from_configuration, self._configuration, save=True)
        return self._loading

    async def _call(self, function: Callable[[Chat], T]) -> T:
        """Run a function of the chat on its thread.

        Raises:
            RequestError: It failed; the message is the sentence for the user.
        """
        loop = asyncio.get_running_loop()
        try:
            chat = await asyncio.shield(asyncio.wrap_future(self._load()))
            return await loop.run_in_executor(self._worker, function, chat)
        except (ConfigError, SessionError) as error:
            raise RequestError(INVALID_PARAMS, str(error)) from error
        except StreamchatError as error:
            raise RequestError(INTERNAL_ERROR, str(error)) from error

    async def _send(self, session: str, update: Any) -> None:
        assert self._client is not None
        await self._client.session_update(session_id=session, update=update)

    async def close(self) -> None:
        """Stop the reply, close the chat, and delete the sessions that got no turn."""
        with suppress(StreamchatError):
            if self._loading is None:
                return
            chat = await asyncio.wrap_future(self._loading)
            chat.stop()
            await asyncio.get_running_loop().run_in_executor(self._worker, chat.close)
            await asyncio.to_thread(self._delete_empty)
        self._worker.shutdown(wait=False)

    def _delete_empty(self) -> None:
        with Store() as store:
            for session in self._created:
                with suppress(SessionError):
                    if not store.find(session).turns:
                        store.delete(session)
