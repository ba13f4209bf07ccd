"""`--serve`: the app through textual-serve, spoken to as a browser does."""

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
from pathlib import Path
from typing import Any

import pytest

from streamchat.cli import main as cli
from streamchat.cli.serve import HOST, without_serve
from tests.models_help import save, tiny_llama

aiohttp = pytest.importorskip("aiohttp")

CONTROLS = re.compile(r"\x1b\[[^a-zA-Z]*[a-zA-Z]")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(*arguments: str, **environment: str) -> Iterator[str]:
    """`streamchat --serve` in a process of its own; the address that it printed."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "streamchat", "--serve", str(port), *arguments]
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
    assert "Traceback" not in out + err


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


def test_a_tab_shows_the_app() -> None:
    with served("--model", "./nowhere") as address:
        asyncio.run(talk(address, ("", "Model not available")))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the machine that serves."""
    path = tmp_path / "secret.txt"
    path.write_text("the word is quetzal")
    return path


def model(tmp_path: Path) -> list[str]:
    folder = save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")
    return ["--model", str(folder), "--dtype", "float32", "--max-new-tokens", "4", "--temperature", "0"]


def test_who_has_the_page_uses_no_file_of_the_machine(tmp_path: Path, secret: Path) -> None:
    """Neither reads one nor writes one; an export goes to the browser."""
    home = Path(os.environ["HOME"])
    before = {path for path in home.iterdir() if path.name != "streamchat"}
    with served(*model(tmp_path)) as address:
        shown = asyncio.run(
            talk(
                address,
                ("", "no chat template"),  # the model is ready
                (f"@{secret}\r", "max_new_tokens"),  # sent as text
                (f"/read {secret}\r", "/read is off"),  # and is back in the input
                ("\x15", "Write a message"),
                (f"/export {home}/new.md\r", "deliver_file_start"),
            )
        )
    assert "@file is off" in CONTROLS.sub("", shown)
    assert "quetzal" not in shown
    assert {path for path in home.iterdir() if path.name != "streamchat"} == before


def test_files_can_be_allowed(tmp_path: Path, secret: Path) -> None:
    """Relative names are those of the folder where the server was started."""
    os.chdir(tmp_path)
    with served(*model(tmp_path), "--serve-files") as address:
        asyncio.run(
            talk(
                address,
                ("", "no chat template"),
                (f"/read {secret.name}\r", "goes with the next message"),
                ("\r", "max_new_tokens"),
                ("/export new.md\r", "written to"),
            )
        )
    assert "quetzal" in (tmp_path / "new.md").read_text()


def test_what_each_tab_is_given() -> None:
    for argv, rest in (
        (["--serve"], []),
        (["--serve", "9000", "--cache-size", "64"], ["--cache-size", "64"]),
        (["--cache-size", "64", "--serve"], ["--cache-size", "64"]),
        (["--serve=9000", "--serve-host", "0.0.0.0", "--plain"], ["--plain"]),
        (["--serve", "--resume", "last"], ["--resume", "last"]),
        (["--serve-url", "http://a", "--serve", "--serve-files"], ["--serve-files"]),
        (["--serve-url=http://a", "--serve"], []),
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
    assert "cannot be opened (Address already in use); choose another port" in capsys.readouterr().err
    assert cli.main(["--serve", "0"]) == 2
    assert "--serve 0: the port must be from 1 to 65535" in capsys.readouterr().err
    for flag in (["--serve-host", "0.0.0.0"], ["--serve-url", "http://a"], ["--serve-files"]):
        assert cli.main(flag) == 2
        assert f"{flag[0]} has no effect without --serve" in capsys.readouterr().err
    assert cli.main(["--serve", "9000", "--cache-size", "many"]) == 2
    assert "cache_size must be" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "streamchat.cli.serve_server", None)
    assert cli.main(["--serve"]) == 2
    assert "--serve needs textual-serve; install it with: pip install textual-serve" in capsys.readouterr().err


def test_a_tab_is_an_app_though_its_ends_are_pipes() -> None:
    environ = {"TEXTUAL_DRIVER": "textual.drivers.web_driver:WebDriver"}
    assert cli.choose_front_end(False, None, None, environ) == "app"
    assert cli.choose_front_end(False, None, None, {}) == "pipe"
