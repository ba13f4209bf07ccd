"""textual-serve's server behind a `Gate`. Importing this needs textual-serve."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp_jinja2
from aiohttp import web
from textual_serve.server import Server, to_int

from streamchat.cli.serve_gate import Gate

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

FONT_SIZE = 16
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",  # the page asks for a font elsewhere
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class GuardedServer(Server):
    """Serves the app to requests with the token, with links to the address that the browser uses.

    Args:
        command: A shell command, the process of each tab.
        gate: Who may use it, and where it listens.
    """

    def __init__(self, command: str, gate: Gate) -> None:
        super().__init__(command, host=gate.host, port=gate.port, title="streamchat")
        self._gate = gate
        self._cookie = f"streamchat-{gate.port}"  # browsers share cookies between the ports of a host

    def initialize_logging(self) -> None:
        """Log warnings only: lines about requests would show the token."""
        logging.basicConfig(level=logging.WARNING, format="streamchat: %(message)s")

    async def on_startup(self, app: web.Application) -> None:
        """Nothing: the address was printed."""

    async def _make_app(self) -> web.Application:
        app: web.Application = await super()._make_app()
        app.middlewares.append(self._guard)
        app.on_response_prepare.append(_add_headers)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every route passes here, before a WebSocket is opened and a process started."""
        if refusal := self._gate.refusal(request.headers.getall("Host", []), request.headers.get("Origin")):
            return _refused(refusal)
        if request.path == "/" and self._gate.is_token(request.query.get("token", "")):
            return self._remember(request)
        if not self._gate.is_token(request.cookies.get(self._cookie, "")):
            return _refused("open the whole address that `streamchat --serve` printed, with its token")
        return await handler(request)

    def _remember(self, request: web.Request) -> web.StreamResponse:
        """The page again, with the token in a cookie instead of the address, where others would read it."""
        rest = request.rel_url.without_query_params("token")
        response = web.Response(status=303, headers={"Location": str(rest)})
        secure = self._scheme(request) == "https"
        response.set_cookie(self._cookie, self._gate.token, httponly=True, samesite="Lax", secure=secure)
        return response

    def _scheme(self, request: web.Request) -> str:
        return self._gate.scheme(request.headers["Host"], request.headers.get("X-Forwarded-Proto", ""))

    @aiohttp_jinja2.template("app_index.html")
    async def handle_index(self, request: web.Request) -> dict[str, Any]:
        """The page. Its addresses begin as the one that the browser used."""
        scheme, host = self._scheme(request), request.headers["Host"]
        socket_scheme = "wss" if scheme == "https" else "ws"
        return {
            "font_size": to_int(request.query.get("fontsize", ""), FONT_SIZE),
            "app_websocket_url": f"{socket_scheme}://{host}/ws",
            "config": {"static": {"url": f"{scheme}://{host}/static/"}},
            "application": {"name": self.title},
        }


def _refused(reason: str) -> web.Response:
    return web.Response(status=403, text=f"streamchat: {reason}\n")


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
