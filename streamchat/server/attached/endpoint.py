"""The route `/v1/attach`: checks who may connect, and which session each connection requests."""

from __future__ import annotations

import re

from starlette.datastructures import Headers, QueryParams
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from streamchat import __version__
from streamchat.attach.frames import VERSION, Hello
from streamchat.server.access import Access
from streamchat.server.attached.clients import Clients
from streamchat.server.attached.connection import Connection
from streamchat.server.attached.host import NewSession, OtherSession
from streamchat.server.attached.session import SharedSession
from streamchat.server.attached.sessions import Newest, SharedSessions, Wish
from streamchat.server.errors import ApiError
from streamchat.server.model_thread import ModelThread

MAX_CONNECTED = 64
"""Maximum number of connected front ends."""
_CLIENT = re.compile(r"[0-9a-zA-Z]{8,64}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,15}", re.ASCII)


class AttachEndpoint:
    """An ASGI application for the WebSockets of front ends.

    Args:
        model: The model's thread; the model is loaded.
        sessions: The sessions of the front ends.
        access: Checks who may connect.
        max_request: Maximum length of a request, in bytes.
    """

    def __init__(self, model: ModelThread, sessions: SharedSessions, access: Access, max_request: int) -> None:
        self._model, self._sessions, self._access, self._max_request = model, sessions, access, max_request
        self._clients = Clients(sessions)
        sessions.wake, sessions.is_viewed = self._wake, self._is_viewed

    @property
    def connected(self) -> int:
        """Number of connected front ends."""
        return len(self._clients.connected())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or refuse it with a sentence."""
        headers, query = Headers(scope=scope), QueryParams(scope["query_string"])
        try:
            self._access.check(headers.getlist("host"), headers.get("origin"), headers.get("authorization", ""))
            client, after = query.get("client", ""), query.get("after", "0")
            if not _CLIENT.fullmatch(client) or not _NUMBER.fullmatch(after):
                raise ApiError(400, "this address is for `streamchat attach`")
            if self._sessions.is_closing:
                raise ApiError(503, "the server is stopping; try again in a moment")
            if self.connected >= MAX_CONNECTED:
                raise ApiError(429, f"{MAX_CONNECTED} front ends are attached already; close one of them")
        except ApiError as error:
            await _deny(error, receive, send)
            return
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        wish: Wish = Newest()
        if name := query.get("session", ""):
            wish = OtherSession(name)
        elif query.get("new"):
            wish = NewSession(None)
        connection = Connection(socket, self._clients.get(client))
        await connection.run(self._hello(), wish, query.get("log", ""), int(after))

    def _hello(self) -> Hello:
        info, saved = self._model.info, self._model.saved
        assert info is not None
        identity = "" if saved is None else saved.identity
        return Hello(VERSION, f"streamchat {__version__}", info.name, self._max_request, identity)

    def _wake(self, shared: SharedSession) -> None:
        for client in self._clients.connected():
            if client.shared is shared:
                client.wake()

    def _is_viewed(self, shared: SharedSession) -> bool:
        viewed = [client.shared.session for client in self._clients.connected() if client.shared is not None]
        return shared.session in viewed


async def _deny(error: ApiError, receive: Receive, send: Send) -> None:
    """Refuse a WebSocket before it is accepted, with a status and one sentence."""
    await receive()
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": str(error).encode()})
