"""`streamchat attach` as a command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamchat.base.errors import ExitCode
from streamchat.cli import main as cli
from tests.support.api_server import Running, serving
from tests.support.tiny_process import free_port

pytest.importorskip("websockets", reason="the package websockets is not installed")

ATTACH = """
import json, sys
from streamchat.cli.main import main
code = main(["attach", *sys.argv[1:]])
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
raise SystemExit(code)
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("attach")) as server:
        yield server


def piped(given: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ATTACH, *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)


def test_a_pipe_needs_neither_torch_nor_transformers(api: Running) -> None:
    done = piped("hello\n/stats\n/detach\n", api.base, "--new")
    assert done.returncode == ExitCode.OK, done.stderr
    *said, modules = done.stderr.rstrip().rsplit("\n", 1)
    assert {"torch", "transformers", "numpy", "starlette", "uvicorn"}.isdisjoint(json.loads(modules))
    assert done.stdout.strip()
    assert any("model" in line and "tiny" in line for line in "".join(said).splitlines() + done.stdout.splitlines())


def test_the_front_ends_need_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, streamchat.commands.attach, streamchat.attach.engine, streamchat.attach.connection, "
        "streamchat.tui.app, streamchat.repl.prompt\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["http://127.0.0.1:{free}"], ExitCode.FAILURE, "no server at http://127.0.0.1:{free} (Connection refused)"),
        (["foo://x"], ExitCode.USAGE, "'foo://x' is not the URL of a server"),
        (["--new", "--session", "x"], ExitCode.USAGE, "--new and --session exclude each other"),
        (["--token-file", "/nowhere/token"], ExitCode.USAGE, "the token file /nowhere/token does not exist"),
        (["--token-file", "x" * 300], ExitCode.USAGE, "cannot be used (File name too long); give another --token-file"),
        (["--model", "x"], ExitCode.USAGE, "unexpected argument --model"),
    ],
)
def test_a_start_that_fails_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: ExitCode, sentence: str
) -> None:
    free = free_port()
    assert cli.main(["attach", *(each.format(free=free) for each in arguments)]) == code
    printed = capsys.readouterr().err
    assert sentence.format(free=free) in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "path", "sentence"),
    [
        ("https", "", "no secure connection to https://127.0.0.1:{port} ("),
        ("http", "/v1/chat", "http://127.0.0.1:{port}/v1/chat serves no front ends; it may be an older version"),
        ("http", "/v1/attach", "http://127.0.0.1:{port}/v1/attach serves no front ends; it may be an older version"),
    ],
)
def test_a_wrong_form_of_the_address_is_one_sentence(
    api: Running, capsys: pytest.CaptureFixture[str], kind: str, path: str, sentence: str
) -> None:
    port = api.server.port
    assert cli.main(["attach", f"{kind}://127.0.0.1:{port}{path}"]) == ExitCode.FAILURE
    printed = capsys.readouterr().err
    assert sentence.format(port=port) in printed
    assert printed.count("\n") == 1


def test_without_the_package_one_sentence_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "websockets.sync.client", None)
    assert cli.main(["attach"]) == ExitCode.USAGE
    assert "pip install 'streamchat[attach]'" in capsys.readouterr().err


def test_saved_sessions_of_another_machine_are_not_mixed_up_with_those_of_this_one(
    api: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    done = piped("hello\n/recall hello\n/sessions\n/title\n", api.base, "--new")
    assert done.returncode == ExitCode.FAILURE
    assert done.stderr.count("on the machine of its server") == 3


def test_the_server_says_how_to_attach(api: Running, tmp_path: Path) -> None:
    from streamchat.commands.serve import _attach_command
    from streamchat.server.options import Options

    assert _attach_command(api.server, Options()) == f"streamchat attach {api.base}"
    options = Options(port=0, token_file=tmp_path / "token")
    with serving(tmp_path, options=options) as server:
        said = _attach_command(server.server, options)
        assert said == f"streamchat attach {server.base} --token-file {tmp_path / 'token'}"
        done = piped("hello\n", *said.split()[2:], "--new")
        assert done.returncode == ExitCode.OK, done.stderr
