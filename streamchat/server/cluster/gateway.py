"""The gateway: checks requests, finds the replica of their session, and forwards its answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from streamchat.base.errors import StoreError
from streamchat.base.host_names import AllowedHosts
from streamchat.server.access import Access
from streamchat.server.app import Guard, error_handlers
from streamchat.server.cluster.plan import ClusterPlan
from streamchat.server.cluster.routing import Directory
from streamchat.server.errors import ApiError
from streamchat.server.limits import read_body
from streamchat.server.requests import Served
from streamchat.store.shared.folder import SharedFolder

_log = logging.getLogger(__name__)
ATTEMPTS = 3
"""Maximum number of times that a request is sent, if replicas are lost before they answer."""
Answer = Callable[[dict[str, Any], bytes, str], AsyncIterator[list[dict[str, Any]]]]
"""(scope, body, route) -> the messages of a replica."""


class ReplicaLostError(Exception):
    """The replica has ended before its answer was complete."""


class Gateway:
    """Forwards requests to replicas.

    Args:
        plan: What all parts have in common.
        answer: Sends a request to a replica; raises ReplicaLostError.
        names: Returns the names of the model.
    """

    def __init__(self, plan: ClusterPlan, answer: Answer, names: Callable[[], Any]) -> None:
        self._plan, self._answer, self._names = plan, answer, names
        self._directory: Directory | None = None

    def app(self) -> ASGIApp:
        """Return the application."""
        options = self._plan.options
        access = Access(AllowedHosts(options.host, options.names), self._plan.token)
        methods = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"]
        route = Route("/{path:path}", _Endpoint(self._forward), methods=methods)
        return Guard(Starlette(routes=[route], exception_handlers=error_handlers()), access, None)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics":
            raise ApiError(404, "a cluster has no /metrics; Ray exports the metrics of its replicas", code="not_found")
        body = await read_body(HttpRequest(scope, receive).stream(), self._plan.options.limits.body_bytes)
        directory = await self._find_directory()
        for attempt in range(ATTEMPTS):
            try:
                route = await asyncio.to_thread(directory.route, scope["path"], body)
            except StoreError as error:
                raise ApiError(503, str(error), code="store_failed") from error
            state = _State()
            try:
                async for messages in self._answer(_plain(scope), body, route):
                    for message in messages:
                        state.note(message)
                        await send(message)
                return
            except ReplicaLostError as error:
                _log.warning("a replica was lost, attempt %d: %s", attempt + 1, error)
                if state.has_started:
                    await state.end(send)
                    return
        raise _lost()

    async def _find_directory(self) -> Directory:
        if self._directory is None:
            settings, limits = self._plan.configuration.settings, self._plan.options.limits
            served = Served(tuple(await self._names()), settings, limits.messages)
            self._directory = Directory(SharedFolder(self._plan.shared), served)
        return self._directory


class _Endpoint:
    """An ASGI endpoint; a class, because Starlette would wrap a function as a request handler."""

    def __init__(self, answer: ASGIApp) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


class _State:
    """What the client has of an answer."""

    def __init__(self) -> None:
        self.has_started = False
        self._is_stream = False

    def note(self, message: dict[str, Any]) -> None:
        """Note a message that is sent."""
        self.has_started = True
        if message["type"] == "http.response.start":
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])

    async def end(self, send: Send) -> None:
        """End an answer that was cut off: a stream with an error, as the server does; others without one."""
        error = json.dumps(_lost().as_dict())
        body = f"data: {error}\n\n".encode() if self._is_stream else b""
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _lost() -> ApiError:
    return ApiError(503, "the replica was lost during the reply; send the request again", code="replica_lost")


def _plain(scope: Scope) -> dict[str, Any]:
    """Return the part of a scope that can be sent to another process."""
    names = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
    return {name: scope[name] for name in names if name in scope} | {"root_path": ""}
