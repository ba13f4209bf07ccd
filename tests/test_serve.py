"""`--serve`: the app through textual-serve, spoken to as a browser does."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from streamchat import cli
from streamchat.commands.serve import HOST, without_serve

aiohttp = pytest.importorskip("aiohttp")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


async def seen(port: int, wanted: str) -> str:
    """What a tab is sent until `wanted` is among it."""
    text = ""
    address = f"http://{HOST}:{port}/ws?width=100&height=30"
    async with asyncio.timeout(60), aiohttp.ClientSession() as session, session.ws_connect(address) as tab:
        async for message in tab:
            data = message.data
            text += data.decode("utf-8", "replace") if isinstance(data, bytes) else str(data)
            if wanted in text:
                break
    return text


def test_a_tab_shows_the_app() -> None:
    port = free_port()
    command = [sys.executable, "-m", "streamchat", "--serve", str(port), "--model", "./nowhere"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    try:
        end = time.monotonic() + 60
        page = ""
        while not page and time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=5) as answer:
                    page = answer.read().decode()
            except OSError:
                time.sleep(0.1)
        assert "streamchat" in page
        text = asyncio.run(seen(port, "nowhere"))
        assert "Model not available" in text
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
    assert f"http://{HOST}:{port}" in err.decode()
    assert b"Traceback" not in out + err


def test_what_each_tab_is_given() -> None:
    for argv, rest in (
        (["--serve"], []),
        (["--serve", "9000", "--cache-size", "64"], ["--cache-size", "64"]),
        (["--cache-size", "64", "--serve"], ["--cache-size", "64"]),
        (["--serve=9000", "--serve-host", "0.0.0.0", "--plain"], ["--plain"]),
        (["--serve", "--resume", "last"], ["--resume", "last"]),
    ):
        assert without_serve(argv) == rest


def test_what_cannot_be_served_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["--serve", str(port)]) == 2
    assert "cannot be served (Address already in use); take another port" in capsys.readouterr().err
    assert cli.main(["--serve", "0"]) == 2
    assert "--serve 0: a port from 1 to 65535 is wanted" in capsys.readouterr().err
    assert cli.main(["--serve", "9000", "--cache-size", "many"]) == 2
    assert "cache_size must be" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "textual_serve.server", None)
    assert cli.main(["--serve"]) == 2
    assert "--serve needs textual-serve; install it with: pip install textual-serve" in capsys.readouterr().err


def test_a_tab_is_an_app_though_its_ends_are_pipes() -> None:
    environ = {"TEXTUAL_DRIVER": "textual.drivers.web_driver:WebDriver"}
    assert cli.choose_face(False, None, None, environ) == "app"
    assert cli.choose_face(False, None, None, {}) == "pipe"
