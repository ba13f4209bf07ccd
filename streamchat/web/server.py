"""textual-serve's server behind a `Gate`, with streamchat's page. Importing this module needs textual-serve."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp_jinja2
from aiohttp import web
from textual_serve.server import Server, to_int

from streamchat.base import paths
from streamchat.base.errors import SessionError, StoreError
from streamchat.store.store import Store
from streamchat.web.gate import Gate
from streamchat.web.launch import Served, tab_command
from streamchat.web.tabs import KEY, KnownTabs, Tab

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
PAGE = "page.html.jinja"
FONT_SIZE, WIDTH, HEIGHT = 16, 80, 24
SHUTDOWN_S = 30.0
"""Maximum seconds for the processes of all tabs to end when the server ends."""
HEADERS = {
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self' {socket}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page: everything comes from this server. xterm.js writes styles into the page."""


class WebServer(Server):
    """Serves the app to requests that pass the gate, with links to the address that the browser uses.

    Args:
        served: What the tabs run.
        gate: Checks requests; also has the address to bind.
    """

    def __init__(self, served: Served, gate: Gate) -> None:
        super().__init__("", host=gate.host, port=gate.port, title="streamchat", templates_path=str(TEMPLATES))
        self._served, self._gate, self._resume = served, gate, served.resume
        self._cookie = f"streamchat-{gate.port}"  # browsers share cookies between the ports of a host
        self._running: dict[asyncio.Task[None], web.WebSocketResponse] = {}
        self._tabs = KnownTabs(paths.state_dir() / "web-tabs.json")

    def initialize_logging(self) -> None:
        """Log warnings only: access logs would contain the token."""
        logging.basicConfig(level=logging.WARNING, format="streamchat: %(message)s")

    async def on_startup(self, app: web.Application) -> None:
        """Do nothing: the address is already printed."""

    async def _make_app(self) -> web.Application:
        app: web.Application = await super()._make_app()
        app.add_routes([web.get("/ws/{tab}", self.handle_websocket)])
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
            return _refused("open the complete address that `streamchat web` printed, with its token")
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

    async def handle_index(self, request: web.Request) -> web.StreamResponse:
        """Render the page, with addresses that match the one the browser used."""
        scheme, host = self._scheme(request), request.headers["Host"]
        socket, nonce = f"{'wss' if scheme == 'https' else 'ws'}://{host}", secrets.token_urlsafe(16)
        context = {
            "font_size": to_int(request.query.get("fontsize", ""), FONT_SIZE),
            "socket_url": f"{socket}/ws",
            "static_url": f"{scheme}://{host}/static/",
            "title": self.title,
            "nonce": nonce,
        }
        response = aiohttp_jinja2.render_template(PAGE, request, context)
        response.headers["Content-Security-Policy"] = POLICY.format(nonce=nonce, socket=socket)
        return response

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        """Run the app for a page until either ends; resume the session that its tab had."""
        websocket = web.WebSocketResponse(heartbeat=15)
        await websocket.prepare(request)
        task = asyncio.create_task(self._use_tab(request, websocket))
        self._running[task] = websocket
        task.add_done_callback(self._running.pop)
        await asyncio.shield(task)  # closing the page cancels this handler, but must not cancel the end of the process
        return websocket

    async def on_shutdown(self, app: web.Application) -> None:
        """Close all tabs, and wait until their processes have saved their conversations."""
        running = dict(self._running)
        await asyncio.gather(*(websocket.close() for websocket in running.values()), return_exceptions=True)
        if running:
            await asyncio.wait(running, timeout=SHUTDOWN_S)

    async def _use_tab(self, request: web.Request, websocket: web.WebSocketResponse) -> None:
        given = request.match_info.get("tab", "")
        key = given if KEY.fullmatch(given) else ""
        async with self._tabs.use(key, websocket.close):
            session = self._tabs.session(key)
            if session is not None and not await asyncio.to_thread(_exists, session):
                session = None
                self._tabs.remember(key, None)
            if session is None:
                session, self._resume = self._resume, None  # for one tab: a session is open in one process only
            await self._run_tab(request, websocket, key, session)

    async def _run_tab(
        self, request: web.Request, websocket: web.WebSocketResponse, key: str, session: str | None
    ) -> None:
        tab = Tab(
            tab_command(self._served, session),
            lambda found: self._tabs.remember(key, found),
            write_bytes=websocket.send_bytes,
            write_str=websocket.send_str,
            close=websocket.close,
            download_manager=self.download_manager,
        )
        try:
            await tab.start(
                to_int(request.query.get("width", ""), WIDTH), to_int(request.query.get("height", ""), HEIGHT)
            )
            await self._process_messages(websocket, tab)
        except Exception as error:  # whatever a page sends must not end the server
            _log.warning("a tab was closed: %s: %s", type(error).__name__, error)
        finally:
            await tab.stop()
        if session is not None and not tab.has_drawn:
            self._tabs.remember(key, None)  # it cannot be resumed: the next page of the tab starts a new one


def _exists(session: str) -> bool:
    """Return whether a saved session exists."""
    try:
        with Store() as store:
            return store.find(session).id == session
    except (SessionError, StoreError):
        return False


def _refused(reason: str) -> web.Response:
    return web.Response(status=403, text=f"streamchat: {reason}\n")


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
