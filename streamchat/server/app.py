"""The routes of the API, as an ASGI application."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamchat.attach.frames import PATH
from streamchat.base.errors import describe_unexpected
from streamchat.server.access import Access
from streamchat.server.calls import News
from streamchat.server.completions import Completion
from streamchat.server.errors import ApiError
from streamchat.server.limits import Admission, Limits, read_json
from streamchat.server.model_thread import ModelThread
from streamchat.server.replies import PING, Reply
from streamchat.server.requests import Request, Served, read_completion, read_response
from streamchat.server.responses import Response

_log = logging.getLogger(__name__)
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Shape(Protocol):
    """Collects the news of a call into what the client gets."""

    def add(self, news: News) -> Iterator[bytes]:
        """Add news; yield the events of a stream that report it."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Return the whole object, after its end."""
        ...


@dataclass(frozen=True)
class Parts:
    """What the application serves."""

    model: ModelThread
    served: Served
    limits: Limits
    metrics: Callable[[], tuple[bytes, str]]
    """Returns the text of `/metrics`, and its media type."""
    created: int
    """When the server started, in seconds since 1970."""
    attach: ASGIApp | None = None
    """Serves the WebSockets of attached front ends; None for none."""


def make_app(parts: Parts, admission: Admission, access: Access) -> ASGIApp:
    """Return the application, with the checks of `access` before every route."""
    return Guard(make_routes(parts, admission), access, parts.attach)


def make_routes(parts: Parts, admission: Admission) -> ASGIApp:
    """Return the application without any check of who may use it."""
    name, figures = parts.served.models[0], _Figures(parts)

    def completion(asked: Request, created: int) -> Shape:
        return Completion(name, created, asked.include_usage)

    def response(asked: Request, created: int) -> Shape:
        return Response(name, created, asked.prompt)

    completions = _Replies(parts, admission, read_completion, completion)
    responses = _Replies(parts, admission, read_response, response)
    routes = [
        Route("/v1/models", figures.models),
        Route("/v1/models/{name:path}", figures.model),
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/metrics", figures.metrics),
    ]
    return Starlette(routes=routes, exception_handlers=error_handlers())


def error_handlers() -> Any:
    """Return what turns errors into answers, for Starlette."""
    return {ApiError: _refuse, HTTPException: _refuse_http, Exception: _refuse_unexpected}


class Guard:
    """Checks every request before its route, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, access: Access, attach: ASGIApp | None) -> None:
        self._app, self._access, self._attach = app, access, attach

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            if scope["path"] == PATH and self._attach is not None:
                await self._attach(scope, receive, send)  # checks the access by itself
            else:
                await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
                await send({"type": "websocket.http.response.body", "body": b"no front ends are served here"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._access.check(headers.getlist("host"), headers.get("origin"), headers.get("authorization", ""))
        except ApiError as error:
            await _answer(error)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)


class _Figures:
    """The answers that need no model."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def models(self, request: HttpRequest) -> HttpResponse:
        return JSONResponse({"object": "list", "data": [self._model(self._parts.served.models[0])]})

    async def model(self, request: HttpRequest) -> HttpResponse:
        name = request.path_params["name"]
        if name not in self._parts.served.models:
            raise ApiError(404, f"the model {name[:80]} is not served here", "model", "model_not_found")
        return JSONResponse(self._model(name))

    async def metrics(self, request: HttpRequest) -> HttpResponse:
        text, media_type = self._parts.metrics()
        return HttpResponse(text, media_type=media_type)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._parts.created, "owned_by": "streamchat"}


class _Replies:
    """Replies to requests of one kind, with one object, or with a stream if the request asks for one.

    Args:
        parts: What the application serves.
        admission: Counts the requests.
        read: Checks the body of a request.
        shape: Returns the shape of the reply to a request that came at a time, in seconds since 1970.
    """

    def __init__(
        self,
        parts: Parts,
        admission: Admission,
        read: Callable[[dict[str, Any], Served], Request],
        shape: Callable[[Request, int], Shape],
    ) -> None:
        self._parts, self._admission, self._read, self._shape = parts, admission, read, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._parts.limits
        with self._admission.slot():
            body = await read_json(HttpRequest(scope, receive).stream(), limits.body_bytes)
            asked = self._read(body, self._parts.served)
            reply = Reply(self._parts.model, asked.prompt, limits.seconds)
            shape = self._shape(asked, int(reply.created))
            async with reply.running(receive):
                if asked.stream:
                    await _stream(reply, shape, send)
                else:
                    await (await _whole(reply, shape))(scope, receive, send)


async def _whole(reply: Reply, shape: Shape) -> HttpResponse:
    async for news in reply.news():
        if isinstance(news, ApiError):
            raise news
        if news is not None:
            for _ in shape.add(news):
                pass
    return JSONResponse(shape.as_dict())


async def _stream(reply: Reply, shape: Shape, send: Send) -> None:
    """Send a stream of events. An error before the first event gets a status of its own."""
    has_started = False
    async for news in reply.news():
        if isinstance(news, ApiError) and not has_started:
            raise news
        if not has_started:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            has_started = True
        events = PING if news is None else b"".join(shape.add(news))
        await send({"type": "http.response.body", "body": events, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _answer(error: ApiError) -> HttpResponse:
    return JSONResponse(error.as_dict(), status_code=error.status, headers=dict(error.headers))


async def _refuse(request: HttpRequest, error: ApiError) -> HttpResponse:
    return _answer(error)


async def _refuse_http(request: HttpRequest, error: HTTPException) -> HttpResponse:
    path = request.url.path
    if error.status_code == 404:
        return _answer(ApiError(404, f"{path[:80]} is not served here", code="not_found"))
    return _answer(
        ApiError(
            error.status_code,
            f"{request.method} {path[:80]} is not possible ({error.detail})",
            code="method_not_allowed" if error.status_code == 405 else None,
            headers=error.headers or {},
        )
    )


async def _refuse_unexpected(request: HttpRequest, error: Exception) -> HttpResponse:
    _log.error("a request failed", exc_info=error)
    return _answer(ApiError(500, f"unexpected {describe_unexpected(error)}", code="internal_error"))
