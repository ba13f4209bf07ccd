"""`streamchat web`: the app through textual-serve, spoken to as a browser does."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from streamchat.cli import flags, parser
from streamchat.cli import main as cli
from streamchat.cli.front_ends import choose_front_end
from streamchat.web import serve as web_serve
from streamchat.web.launch import HOST, Served, tab_command
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
@pytest.mark.usefixtures("compiled_kernels")
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
@pytest.mark.usefixtures("compiled_kernels")
def test_files_can_be_allowed(tmp_path: Path, secret: Path) -> None:
    """Relative names are those of the folder where the server was started."""
    os.chdir(tmp_path)
    with served(*model(tmp_path), "--files") as address:
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


@pytest.mark.parametrize(
    ("argv", "rest"),
    [
        ([], ()),
        (["--port", "9000", "--cache-size", "64"], ("--cache-size=64",)),
        (["--host=0.0.0.0", "--theme", "a b", "--no-history"], ("--theme=a b", "--no-history")),
        (["--template-arg", "a=1", "--template-arg=b=x y"], ("--template-arg=a=1", "--template-arg=b=x y")),
        (["--url", "http://a", "--files", "--temperature=-1"], ("--temperature=-1",)),
    ],
)
def test_what_each_tab_is_given(argv: list[str], rest: tuple[str, ...]) -> None:
    args = parser.parse(["web", *argv])
    given = flags.given_flags(args)
    assert sorted(given) == sorted(rest)
    again = parser.parse(given)
    assert all(getattr(args, name) == getattr(again, name) for name in ("cache_size", "theme") if name in args)
    tab = shlex.split(tab_command(Served(given, files=args.files), "abc123"))
    assert ("--tab-files" in tab) == args.files
    assert tab[-1] == "--resume=abc123"
    assert set(given) <= set(tab)


def test_a_configuration_file_is_found_from_the_folder_of_the_tab(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    args = parser.parse(["web", "--config", "mine.toml"])
    assert flags.given_flags(args) == (f"--config={tmp_path / 'mine.toml'}",)


def test_what_cannot_be_served_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["web", "--port", str(port)]) == 2
    assert "cannot be opened (Address already in use); choose another port" in capsys.readouterr().err
    assert cli.main(["web", "--port", "0"]) == 2
    assert "--port 0: the port must be from 1 to 65535" in capsys.readouterr().err
    assert cli.main(["web", "--cache-size", "many"]) == 2
    assert "cache_size must be" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "streamchat.web.server", None)
    assert cli.main(["web"]) == 2
    assert "`streamchat web` needs textual-serve; run: pip install 'streamchat[web]'" in capsys.readouterr().err


def test_the_old_flags_say_the_command_and_do_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Served] = []

    def serve(each: Served) -> int:
        served.append(each)
        return 0

    monkeypatch.setattr(web_serve, "serve", serve)
    assert cli.main(["--serve=9000", "--serve-host", "0.0.0.0", "--serve-files", "--cache-size", "64"]) == 0
    assert served == [Served(("--cache-size=64",), "0.0.0.0", 9000, files=True)]
    assert capsys.readouterr().err == (
        "streamchat: --serve is now `streamchat web`; the next release removes the flag\n"
    )
    for flag in (["--serve-host", "0.0.0.0"], ["--serve-url", "http://a"], ["--serve-files"]):
        assert cli.main(flag) == 2
        new = flag[0].replace("serve-", "")
        assert f"{flag[0]} has no effect without --serve; use `streamchat web {new}`" in capsys.readouterr().err


def test_a_tab_is_an_app_though_its_ends_are_pipes() -> None:
    environ = {"TEXTUAL_DRIVER": "textual.drivers.web_driver:WebDriver"}
    assert choose_front_end(False, None, None, environ) == "app"
    assert choose_front_end(False, None, None, {}) == "pipe"
