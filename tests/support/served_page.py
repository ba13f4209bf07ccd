"""`streamchat web` in a process of its own, spoken to as a browser does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from streamchat.web.launch import HOST

aiohttp = pytest.importorskip("aiohttp")
CONTROLS = re.compile(r"\x1b\[[^a-zA-Z]*[a-zA-Z]")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(*arguments: str, **environment: str) -> Iterator[str]:
    """`streamchat web` in a process of its own; the address that it printed."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "streamchat", "web", "--port", str(port), *arguments]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment}, text=True
    )
    assert server.stderr is not None
    printed = ""
    try:
        printed = server.stderr.readline()
        yield re.findall(r"http://\S+", printed)[0]
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    assert server.returncode in (0, 130)
    token = printed.partition("token=")[2].strip()
    assert len(token) == 43
    assert token not in out + err  # printed once
    assert "Traceback" not in out + err, out + err


async def talk(address: str, *steps: tuple[str, str]) -> str:
    """Open the page at `address` and its tab; for each step type a text, and wait until another is shown."""
    everything = ""
    jar = aiohttp.CookieJar(unsafe=True)  # of an address without a name, too
    async with asyncio.timeout(100), aiohttp.ClientSession(cookie_jar=jar) as session:
        async with await until_open(session, address) as answer:
            assert answer.status == 200
            assert "token" not in str(answer.url)
            page = await answer.text()
        socket_url = re.findall(r'data-session-websocket-url="(.*?)"', page)[0]
        origin = {"Origin": address.partition("/?")[0]}
        async with session.ws_connect(f"{socket_url}?width=140&height=30", headers=origin) as tab:
            for typed, wanted in steps:
                text = ""
                if typed:
                    await tab.send_json(["stdin", typed])
                async for message in tab:
                    data = message.data
                    new = data.decode("utf-8", "replace") if isinstance(data, bytes) else str(data)
                    text, everything = text + new, everything + new
                    if wanted in CONTROLS.sub("", text):
                        break
                else:
                    raise AssertionError(f"{wanted!r} was not shown: {text[-3000:]}")
    return everything


async def until_open(session: Any, address: str) -> Any:
    while True:
        try:
            return await session.get(address)
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.1)
