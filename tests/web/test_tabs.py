"""The tabs of `streamchat web`: a page finds the conversation of its tab again."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("textual_serve")

from aiohttp import ClientConnectionResetError, ClientWebSocketResponse, WSMsgType
from aiohttp.test_utils import TestClient, TestServer

from streamchat.web import server as web_server
from streamchat.web import tabs
from streamchat.web.gate import Gate
from streamchat.web.launch import SESSION_META, Served, tab_command
from streamchat.web.server import WebServer
from streamchat.web.tabs import MAX_KNOWN, KnownTabs

KEY, OTHER = "k" * 32, "o" * 32
PORT = 8000
HEADERS = {"Host": f"127.0.0.1:{PORT}", "Origin": f"http://127.0.0.1:{PORT}"}


def test_sessions_are_kept_and_the_oldest_are_forgotten(tmp_path: Path) -> None:
    known = KnownTabs(tmp_path / "new" / "tabs.json")
    for number in range(MAX_KNOWN + 2):
        known.remember(f"{number:032}", f"session{number}")
    known.remember("", "nothing")
    again = KnownTabs(tmp_path / "new" / "tabs.json")
    assert again.session(f"{0:032}") is None
    assert again.session(f"{1:032}") is None
    assert again.session(f"{2:032}") == "session2"
    assert again.session("") is None
    again.remember(f"{2:032}", None)
    assert KnownTabs(tmp_path / "new" / "tabs.json").session(f"{2:032}") is None


@pytest.mark.parametrize("text", ["", "[]", '{"short": "a"}', json.dumps({KEY: 3, "../" * 11: "a"}), "\0"])
def test_a_damaged_file_is_no_session(tmp_path: Path, text: str) -> None:
    (tmp_path / "tabs.json").write_text(text)
    known = KnownTabs(tmp_path / "tabs.json")
    assert known.session(KEY) is None
    known.remember(KEY, "abc")
    assert KnownTabs(tmp_path / "tabs.json").session(KEY) == "abc"


async def test_the_newest_connection_of_a_tab_waits_until_the_older_has_ended(tmp_path: Path) -> None:
    known, order, closed = KnownTabs(tmp_path / "tabs.json"), list[str](), asyncio.Event()

    async def nothing() -> None:
        """Does not close."""

    async def close() -> None:
        closed.set()

    async def older() -> None:
        async with known.use(KEY, close):
            await closed.wait()
            await asyncio.sleep(0.01)
            order.append("older ends")

    async def newer() -> None:
        async with known.use(KEY, nothing):
            order.append("newer starts")

    first = asyncio.create_task(older())
    await asyncio.sleep(0)
    async with known.use(OTHER, nothing), known.use("", nothing), known.use("", nothing):
        assert not closed.is_set()  # other tabs are left alone
    await asyncio.gather(first, newer())
    assert order == ["older ends", "newer starts"]


class Process:
    """In the place of a tab's process: reports a session, and draws unless it cannot resume."""

    commands: ClassVar[list[str]] = []
    running = 0
    most = 0
    broken = ""

    def __init__(self, command: str, on_session: Any, **given: Any) -> None:
        self.command, self.on_session, self.write = command, on_session, given["write_bytes"]
        self.has_drawn, self.close = False, given["close"]

    async def start(self, width: int, height: int) -> None:
        Process.commands.append(self.command)
        Process.running += 1
        Process.most = max(Process.most, Process.running)
        if self.broken and self.broken in self.command:
            await self.close()
            return
        self.has_drawn = True
        await self.write(b"drawn")

    async def send_bytes(self, data: bytes) -> None:
        self.on_session(data.decode() or None)
        await self.write(b"seen")

    async def stop(self) -> None:
        await asyncio.sleep(0.02)
        Process.running -= 1


@pytest.fixture(autouse=True)
def _processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "Tab", Process)
    monkeypatch.setattr(Process, "broken", "")
    Process.commands, Process.most = [], 0


async def say(tab: ClientWebSocketResponse, text: str) -> None:
    await tab.send_json(["stdin", text])
    while (await tab.receive()).data != b"seen":
        pass


async def test_a_reload_resumes_what_the_tab_had_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "_exists", lambda session: session != "deleted")
    served, gate = Served(resume="first"), Gate("127.0.0.1", PORT)
    headers = HEADERS | {"Cookie": f"streamchat-{PORT}={gate.token}"}
    app = await WebServer(served, gate)._make_app()
    async with TestClient(TestServer(app)) as client:

        async def open_(path: str) -> ClientWebSocketResponse:
            tab = await client.ws_connect(path, headers=headers)
            assert (await tab.receive()).data == b"drawn"
            return tab

        tab = await open_(f"/ws/{KEY}")
        await say(tab, "abc123")
        again = await open_(f"/ws/{KEY}")  # before the first has gone
        assert (await tab.receive()).type in (WSMsgType.CLOSE, WSMsgType.CLOSED)
        other = await open_(f"/ws/{OTHER}")
        nameless = [await open_("/ws"), await open_("/ws/short"), await open_(f"/ws/{'x' * 65}")]
        await say(again, "deleted")
        await say(other, "def456")
        await say(other, "")  # cleared
        for each in (again, other, *nameless):
            await each.close()
        for path in (f"/ws/{KEY}", f"/ws/{OTHER}"):
            await (await open_(path)).close()
        # one that cannot be resumed is forgotten
        last = await open_(f"/ws/{KEY}")
        await say(last, "locked")
        await last.close()
        monkeypatch.setattr(Process, "broken", "--resume=locked")
        broken = await client.ws_connect(f"/ws/{KEY}", headers=headers)
        assert (await broken.receive()).type == WSMsgType.CLOSE
        await (await open_(f"/ws/{KEY}")).close()
    sessions = ["first", "abc123", None, None, None, None, None, None, None, "locked", None]
    assert Process.commands == [tab_command(served, session) for session in sessions]
    assert Process.running == 0
    assert Process.most == 5


async def test_the_app_reports_its_session_to_the_server_and_not_to_the_page() -> None:
    seen: list[str | None] = []
    sent: list[str] = []

    async def write(text: Any) -> None:
        sent.append(text)

    tab = tabs.Tab(
        "",
        seen.append,
        write_bytes=write,
        write_str=write,
        close=write,
        download_manager=None,
    )
    for session in ("abc123", None):
        await tab.on_meta(json.dumps({"type": SESSION_META, "session": session}).encode())
    assert seen == ["abc123", None]
    assert not sent
    await tab.on_meta(json.dumps({"type": "open_url", "url": "http://a", "new_tab": True}).encode())
    assert "open_url" in sent[0]
    assert not tab.has_drawn
    await tab.on_data(b"text")
    assert tab.has_drawn


PROGRAM = """
import json, os, sys, time
out = sys.stdout.buffer
packet = lambda kind, data: out.write(kind + len(data).to_bytes(4, "big") + data)
out.write(b"__GANGLION__\\n")
for _ in range(64):  # more than a pipe holds
    packet(b"D", bytes(65536))
packet(b"M", json.dumps({"type": "open_url", "url": "", "new_tab": True}).encode())
packet(b"M", json.dumps({"type": "session", "session": "abc123"}).encode())
out.flush()
os.close(1)
time.sleep(0.5)  # saves
sys.stderr.write("." * 200_000)
open(sys.argv[1], "w").close()
"""
"""An app that draws, closes its output, saves, and exits."""


async def test_a_tab_whose_page_has_left_ends_when_its_process_has_exited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def write(data: Any) -> None:
        raise ClientConnectionResetError("Cannot write to closing transport")

    async def close() -> None:
        closed.append(saved.exists())

    class Downloads:
        async def cancel_app_downloads(self, app_service_id: str) -> None:
            """Has none."""

    program, saved = tmp_path / "program.py", tmp_path / "saved"
    program.write_text(PROGRAM.replace('"session", ', f'"{SESSION_META}", '))
    closed, seen = list[bool](), list[str | None]()
    tab = tabs.Tab(
        shlex.join([sys.executable, "-I", "-S", str(program), str(saved)]),
        seen.append,
        write_bytes=write,
        write_str=write,
        close=close,
        download_manager=Downloads(),
    )
    await tab.start(80, 24)
    async with asyncio.timeout(60):
        await tab.stop()
    assert saved.exists()
    assert seen == ["abc123"]
    assert closed[-1]
    assert "Traceback" not in "".join(capsys.readouterr())
