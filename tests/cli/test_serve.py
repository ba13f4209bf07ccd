"""`--serve`: the app through textual-serve, spoken to as a browser does."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest

from streamchat.cli import main as cli
from streamchat.cli.front_ends import choose_front_end
from streamchat.cli.serve import HOST, without_serve
from tests.support.models_help import save, tiny_llama
from tests.support.served_page import served, talk


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert "quetzal" not in shown
    assert {path for path in home.iterdir() if path.name != "streamchat"} == before


@pytest.mark.slow
def test_files_can_be_allowed(tmp_path: Path, secret: Path) -> None:
    """Relative names are those of the folder where the server was started."""
    os.chdir(tmp_path)
    with served(*model(tmp_path), "--serve-files") as address:
        asyncio.run(
            talk(
                address,
                ("", "no chat template"),
                (f"/read {secret.name}\r", "will be attached to your next message"),
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
    assert choose_front_end(False, None, None, environ) == "app"
    assert choose_front_end(False, None, None, {}) == "pipe"
