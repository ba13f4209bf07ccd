"""textual-serve's server behind a `Gate`. Importing this module needs textual-serve."""

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
    "Referrer-Policy": "same-origin",  # the page loads a font from another site
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class GuardedServer(Server):
    """Serves the app to requests that pass the gate, with links to the address that the browser uses.

    Args:
        command: Shell command that each tab runs.
        gate: Checks requests; also has the address to bind.
    """

    def __init__(self, command: str, gate: Gate) -> None:
        super().__init__(command, host=gate.host, port=gate.port, title="streamchat")
        self._gate = gate
        self._cookie = f"streamchat-{gate.port}"  # browsers share cookies between the ports of a host

    def initialize_logging(self) -> None:
        """Log warnings only: access logs would contain the token."""
        logging.basicConfig(level=logging.WARNING, format="streamchat: %(message)s")

    async def on_startup(self, app: web.Application) -> None:
        """Do nothing: the address is already printed."""

    async def _make_app(self) -> web.Application:
        app: web.Application = await super()._make_app()
        app.middlewares.append(self._guard)
        app.on_response_prepare.append(_add_headers)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check every request, before a WebSocket is opened or a process started."""
        if refusal := self._gate.refusal(request.headers.getall("Host", []), request.headers.get("Origin")):
            return _refused(refusal)
        if request.path == "/" and self._gate.is_token(request.query.get("token", "")):
            return self._remember(request)
        if not self._gate.is_token(request.cookies.get(self._cookie, "")):
            return _refused("open the complete address that `streamchat --serve` printed, with its token")
        return await handler(request)

    def _remember(self, request: web.Request) -> web.StreamResponse:
        """Redirect to the page with the token in a cookie: in the address, others could read it."""
        rest = request.rel_url.without_query_params("token")
        response = web.Response(status=303, headers={"Location": str(rest)})
        secure = self._scheme(request) == "https"
        response.set_cookie(self._cookie, self._gate.token, httponly=True, samesite="Lax", secure=secure)
        return response

    def _scheme(self, request: web.Request) -> str:
        return self._gate.scheme(request.headers["Host"], request.headers.get("X-Forwarded-Proto", ""))

    @aiohttp_jinja2.template("app_index.html")
    async def handle_index(self, request: web.Request) -> dict[str, Any]:
        """Render the page, with addresses that match the one the browser used."""
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
