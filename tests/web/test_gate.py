"""`streamchat web` answers its own page with its token, and nobody else: no other page, name, user or program."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from streamchat.base.errors import ConfigError
from streamchat.base.host_names import host_name
from streamchat.cli import main as cli
from streamchat.web.gate import Gate, checked_url

pytest.importorskip("textual_serve")

from aiohttp.test_utils import TestClient, TestServer

from streamchat.web import server as web_server
from streamchat.web.launch import Served, tab_command
from streamchat.web.server import WebServer

PORT = 8000
HERE = f"127.0.0.1:{PORT}"
PATHS = ("/", "/ws", "/static/js/textual.js", "/static/", "/download/0", "/nowhere")

started: list[str] = []


class Tab:
    """In the place of a tab's process."""

    has_drawn = True

    def __init__(self, command: str, on_session: Callable[[str | None], None], **_: Any) -> None:
        self.command, self.on_session = command, on_session

    async def start(self, width: int, height: int) -> None:
        started.append(self.command)

    async def stop(self) -> None:
        """Nothing."""


@pytest.fixture(autouse=True)
def _tabs(monkeypatch: pytest.MonkeyPatch) -> None:
    started.clear()
    monkeypatch.setattr(web_server, "Tab", Tab)


@contextlib.asynccontextmanager
async def client_of(gate: Gate) -> AsyncIterator[TestClient[Any, Any]]:
    app = await WebServer(Served(("--cache-size=64",)), gate)._make_app()
    async with TestClient(TestServer(app)) as client:
        yield client


def with_token(gate: Gate) -> dict[str, str]:
    return {"Host": HERE, "Cookie": f"streamchat-{gate.port}={gate.token}"}


def handshake(origin: str | None = f"http://{HERE}") -> dict[str, str]:
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    return headers if origin is None else {**headers, "Origin": origin}


async def status(client: TestClient[Any, Any], path: str, headers: dict[str, str]) -> int:
    async with client.get(path, headers=headers, allow_redirects=False) as answer:
        return int(answer.status)


async def test_the_address_opens_the_page_and_the_page_everything_else() -> None:
    gate = Gate("127.0.0.1", PORT)
    async with client_of(gate) as client:
        async with client.get(
            f"/?token={gate.token}&fontsize=20", headers={"Host": HERE}, allow_redirects=False
        ) as answer:
            assert answer.status == 303
            assert answer.headers["Location"] == "/?fontsize=20"  # the token does not stay in the address
            cookie = answer.headers["Set-Cookie"]
            assert cookie.startswith(f"streamchat-{PORT}={gate.token};")
            assert "HttpOnly" in cookie
            assert "SameSite=Lax" in cookie
        async with client.get("/?fontsize=20", headers=with_token(gate)) as answer:
            page = await answer.text()
            assert answer.headers["Referrer-Policy"] == "same-origin"
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
        assert f'data-session-websocket-url="ws://{HERE}/ws"' in page
        assert f'src="http://{HERE}/static/js/textual.js"' in page
        assert 'data-font-size="20"' in page
        assert gate.token not in page
        assert await status(client, "/static/js/textual.js", with_token(gate)) == 200
        assert await status(client, "/download/0", with_token(gate)) == 404
        assert await status(client, "/ws", with_token(gate) | handshake()) == 101
        assert await status(client, "/ws", with_token(gate) | handshake(None)) == 101  # no browser
    assert started == [tab_command(Served(("--cache-size=64",)), None)] * 2


@pytest.mark.parametrize("path", PATHS)
async def test_without_the_token_nothing_is_there(path: str) -> None:
    gate = Gate("127.0.0.1", PORT)
    async with client_of(gate) as client:
        for cookie in (
            "",
            f"streamchat-{PORT}=",
            f"streamchat-{PORT}={gate.token[:-1]}",
            f"streamchat-{PORT}={gate.token}x",
            f"streamchat-{PORT}={Gate('127.0.0.1', PORT).token}",
            f"streamchat-{PORT}=ÿ",
            f"streamchat-{PORT + 1}={gate.token}",
        ):
            headers = {"Host": HERE, "Cookie": cookie} | (handshake() if path == "/ws" else {})
            assert await status(client, path, headers) == 403, cookie
        wrong = f"{path}?token={gate.token[:-1]}"
        assert await status(client, wrong, {"Host": HERE} | (handshake() if path == "/ws" else {})) == 403
    assert not started


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1.evil.example", "192.0.2.7", "", "127.0.0.1@evil", "a b"]
)
async def test_another_name_is_refused_with_the_token_too(path: str, host: str) -> None:
    """A hostile page whose name was made to point here (DNS rebinding)."""
    gate = Gate("127.0.0.1", PORT)
    async with client_of(gate) as client:
        headers = with_token(gate) | {"Host": host} | (handshake(f"http://{host}") if path == "/ws" else {})
        assert await status(client, path, headers) == 403
        if path == "/":
            assert await status(client, f"/?token={gate.token}", {"Host": host}) == 403
    assert not started


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        f"http://127.0.0.1:{PORT + 1}",  # another program of this machine
        "http://127.0.0.1",
        f"http://localhost:{PORT}",
        f"http://{HERE}.evil.example",
        f"ftp://{HERE}",
        HERE,
        "null",
        "",
    ],
)
async def test_another_page_is_refused_with_the_token_too(origin: str) -> None:
    gate = Gate("127.0.0.1", PORT)
    async with client_of(gate) as client:
        for path in PATHS:
            assert await status(client, path, with_token(gate) | handshake(origin)) == 403, path
    assert not started


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_served_to_other_machines_the_page_has_the_address_that_they_use(host: str) -> None:
    gate = Gate(host, PORT)
    assert all("0.0.0.0" not in address and "[::]" not in address for address in gate.addresses())
    async with client_of(gate) as client:
        for used in ("192.0.2.7:9000", "[2001:db8::7]:8000", f"{socket.gethostname()}:8000", "localhost:9000"):
            async with client.get("/", headers=with_token(gate) | {"Host": used}) as answer:
                page = await answer.text()
            assert answer.status == 200
            assert f"ws://{used}/ws" in page
            assert f"http://{used}/static/js/textual.js" in page
            assert "0.0.0.0" not in page
            assert await status(client, "/ws", with_token(gate) | {"Host": used} | handshake(f"http://{used}")) == 101
        assert await status(client, "/", with_token(gate) | {"Host": "evil.example"}) == 403


async def test_behind_a_proxy() -> None:
    gate = Gate("127.0.0.1", PORT, checked_url("https://Chat.example.org/"))
    assert gate.addresses() == ["https://chat.example.org"]
    async with client_of(gate) as client:
        host = {"Host": "chat.example.org"}
        async with client.get(f"/?token={gate.token}", headers=host, allow_redirects=False) as answer:
            assert "Secure" in answer.headers["Set-Cookie"]
        async with client.get("/", headers=with_token(gate) | host) as answer:
            assert "wss://chat.example.org/ws" in await answer.text()
        origin = handshake("https://chat.example.org")
        assert await status(client, "/ws", with_token(gate) | host | origin) == 101
        # a proxy that is not told of, on this machine
        forwarded = with_token(gate) | {"Host": "localhost", "X-Forwarded-Proto": "https"}
        async with client.get("/", headers=forwarded) as answer:
            assert "wss://localhost/ws" in await answer.text()


def test_two_host_headers_are_refused() -> None:
    gate = Gate("127.0.0.1", PORT)
    assert not gate.refusal([HERE], None)
    assert gate.refusal([HERE, "evil.example"], None)
    assert gate.refusal([], None)


def test_names_of_hosts() -> None:
    for header, name in (
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("localhost.", "localhost"),
        ("[::1]:8000", "::1"),
        ("my_host-2.example.org", "my_host-2.example.org"),
        ("", None),
        (":8000", None),
        ("a/b", None),
        ("a?b", None),
        ("a#b", None),
        ("a:b", None),
        ("a:99999", None),
        ("[::1", None),
        ('a"><script>', None),
        ("ä.example", None),
    ):
        assert host_name(header) == name, header


def test_the_address_that_browsers_use_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for good in ("https://chat.example.org", "http://10.0.0.1:8080", "http://[::1]:80"):
        assert checked_url(good) == good
    for bad in (
        "chat.example.org",
        "https://",
        "https://chat.example.org/chat",
        "https://a:b@c",
        "ftp://a",
        "https://a?b",
        "https://a:x",
        "https://a b",
    ):
        with pytest.raises(ConfigError, match="--url"):
            checked_url(bad)
    assert cli.main(["web", "--url", "chat.example.org"]) == 2
    assert "--url chat.example.org: must be an address without a path" in capsys.readouterr().err
