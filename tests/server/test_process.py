"""The server as a process: signals, a kill in the middle of a reply, and starts that fail."""

from __future__ import annotations

import builtins
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamchat.base.errors import ExitCode
from streamchat.cli import main as cli
from streamchat.store.lock import is_open
from streamchat.store.store import Store
from tests.support.api_server import session_of
from tests.support.models_help import save, tiny_llama
from tests.support.tiny_process import ROOT, free_port, process


def client_of(port: int) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=60, trust_env=False)


def respond(client: httpx.Client, text: str, previous: str | None = None, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "input": text, "previous_response_id": previous} | fields
    answer = client.post("/responses", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def begin_endless(client: httpx.Client, previous: str, stack: Any) -> str:
    """The id of a reply that is being generated."""
    body = {"model": "tiny", "input": "go on", "previous_response_id": previous, "stream": True}
    stream = stack.enter_context(client.stream("POST", "/responses", json=body | {"max_output_tokens": 10**6}))
    id_ = ""
    for line in stream.iter_lines():
        if '"response.created"' in line and not id_:
            id_ = line.split('"id": "')[1].split('"')[0]
        if "output_text.delta" in line:
            return str(id_)
    raise AssertionError("no reply")


def test_a_kill_in_the_middle_of_a_reply_loses_no_id() -> None:
    """After a restart, the id before the reply continues its session, and so does that of the cut reply."""
    import contextlib

    port = free_port()
    with process(port) as server, client_of(port) as client, contextlib.ExitStack() as stack:
        first = respond(client, "hello")
        second = respond(client, "and now?", first["id"])
        cut = begin_endless(client, second["id"], stack)
        for _ in range(2):  # until the reply is on the disk
            respond(client, "another session", max_output_tokens=200)
        server.send_signal(signal.SIGKILL)
        server.wait()
        with contextlib.suppress(httpx.HTTPError):
            stack.close()
    with process(port), client_of(port) as client:
        after_cut = respond(client, "where were we?", cut)
        assert session_of(after_cut["id"]) == session_of(first["id"])
        before_cut = respond(client, "where were we?", second["id"])
        assert before_cut["id"].count("_") == 3
        earliest = respond(client, "where were we?", first["id"])
        assert len({session_of(each["id"]) for each in (after_cut, before_cut, earliest)}) == 3


def test_after_a_kill_the_id_before_replaces_the_cut_turn() -> None:
    port = free_port()
    import contextlib

    with process(port) as server, client_of(port) as client, contextlib.ExitStack() as stack:
        first = respond(client, "hello")
        begin_endless(client, first["id"], stack)
        server.kill()
        server.wait()
        with contextlib.suppress(httpx.HTTPError):
            stack.close()
    with process(port), client_of(port) as client:
        second = respond(client, "where were we?", first["id"])
        assert session_of(second["id"]) == session_of(first["id"])
    with Store() as store:
        [session] = store.sessions()
        assert [turn.text for turn in store.load(session.id).turns] == ["hello", "where were we?"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_replies_saves_sessions_and_ends_with_0(number: signal.Signals) -> None:
    import contextlib

    port = free_port()
    with process(port) as server, client_of(port) as client, contextlib.ExitStack() as stack:
        first = respond(client, "hello")
        begin_endless(client, first["id"], stack)
        server.send_signal(number)
        assert server.wait(60) == ExitCode.OK
        assert server.stderr is not None
        assert server.stderr.read() == ""
        with contextlib.suppress(httpx.HTTPError):
            stack.close()
    with Store() as store:
        [session] = store.sessions()
        assert session.opened_by is None
        assert not is_open(store.lock_folder, session)
        assert store.snapshot_path(session.id).is_file()
        turns = store.load(session.id).turns
    assert [turn.finish_reason for turn in turns] == ["length", "cancelled"]
    assert turns[1].reply


def test_sessions_are_those_of_every_other_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The list, the search, and the monitor of another process show a session of the server while it runs."""
    port = free_port()
    with process(port), client_of(port) as client:
        found = respond(client, "tell me about the lighthouse")
        assert cli.main(["sessions", "list", "lighthouse"]) == ExitCode.OK
        assert session_of(found["id"]) in capsys.readouterr().out
        assert cli.main(["monitor", session_of(found["id"]), "--once"]) == ExitCode.OK
        shown = capsys.readouterr().out
        assert "lighthouse" in shown
        assert "running" in shown
        assert cli.main(["--resume", session_of(found["id"]), "--plain"]) == ExitCode.STORE
        assert "is open in another streamchat process" in capsys.readouterr().err


def test_ctrl_c_does_not_wait_for_a_compiler(tmp_path: Path) -> None:
    """The first start compiles the kernels, which takes a minute on a busy machine."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ntouch "$0.started"\nexec sleep 60\n')
    compiler.chmod(0o700)
    command = [sys.executable, "-m", "streamchat", "serve", "--port", "0", "--model", str(save(tiny_llama(), tmp_path))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CC": str(compiler)}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's job in the background ignores it
    ) as server:
        while server.poll() is None and not Path(f"{compiler}.started").exists():
            time.sleep(0.05)
        server.send_signal(signal.SIGINT)
        try:
            assert server.wait(30) == ExitCode.INTERRUPTED
        finally:
            os.killpg(server.pid, signal.SIGKILL)
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()


# --- starts that fail ---------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == ExitCode.USAGE
    assert f"http://127.0.0.1:{port} cannot be opened (Address already in use); choose another --port" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("missing", ["greenlet", "starlette", "uvicorn"])
def test_a_missing_package_is_one_sentence(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == missing:
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["serve"]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        f"streamchat: `streamchat serve` needs {missing}; run: pip install 'streamchat[server]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--port 70000", "--port 70000 must be from 0 to 65535"),
        ("--live 0", "--live 0 must be at least 1"),
        ("--max-requests 0", "--max-requests 0 must be at least 1"),
        ("--max-seconds nan", "--max-seconds nan must be above 0"),
        ("--max-body x", "--max-body"),
        ("--allow-host http://x", "--allow-host 'http://x' is not a host name"),
        ("--host no.such.host.invalid", "--host 'no.such.host.invalid' cannot be used"),
        ("--host 192.0.2.1 --port 0", "cannot be opened"),
        ("--token-file .", "cannot be used"),
        ("--model nothing-like-that", "nothing-like-that"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", "0", *arguments.split()]) in (ExitCode.USAGE, ExitCode.MODEL)
    found = capsys.readouterr().err
    assert text in found
    assert found.count("\n") == 1
