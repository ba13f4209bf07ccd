"""Success means effect, for the commands of the command line and the calls of the API: see test_effects.py."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from streamchat.cli import main as cli
from streamchat.cli.parser import build_parser
from streamchat.server import app as server_app
from streamchat.store.backup import back_up_daily, backup_folder
from streamchat.store.database import database_path
from tests.support.api_server import serving
from tests.support.effects import other_process, rows, said, talking
from tests.support.saved_sessions import stored

Effect = Callable[..., Any]
EFFECTS: dict[str, Effect] = {}
"""The test of each command or call that claims an effect."""
ELSEWHERE = {
    "replay": "tests/replay/test_replay.py::test_a_run_that_holds",
    "bench": "tests/benchmarks/test_bench.py::test_the_command",
    "ppl": "tests/benchmarks/test_perplexity.py::test_the_command",
    "sweep": "tests/benchmarks/test_sweep.py::test_the_command",
    "verify": "tests/verify/test_verify.py::test_the_command_as_json",
    "sessions repair": "tests/e2e/test_doctor.py::test_broken_indexes_are_found_and_mended",
}
"""Those that write a report, or are tested by another path next to what they repair."""
SHOWS = {
    "serve": "its calls are below",
    "web": "its chats are the app's",
    "acp": "its chats are saved like any other",
    "monitor": "only reads",
    "sessions": "lists",
    "sessions list": "lists",
    "sessions show": "prints",
    "sessions backups": "lists",
    "models": "lists; fetches nothing",
    "doctor": "examines",
    "completion": "prints a script",
    "GET /v1/models": "lists",
    "GET /v1/models/{name:path}": "shows one",
    "GET /metrics": "shows figures",
}


def effect(name: str) -> Callable[[Effect], Effect]:
    """Enter a test for `name`."""

    def enter(test: Effect) -> Effect:
        assert name not in EFFECTS
        EFFECTS[name] = test
        return test

    return enter


def commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[str]:
    """The names of all commands below a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield f"{prefix}{name}"
                yield from commands(below, f"{prefix}{name} ")


def test_every_command_and_call_has_an_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def noted(path: str, endpoint: Any, methods: tuple[str, ...] = ("GET",)) -> Route:
        calls.extend(f"{method} {path}" for method in methods)
        return Route(path, endpoint, methods=list(methods))

    monkeypatch.setattr(server_app, "Route", noted)
    with serving(tmp_path):
        assert calls
    names = {*commands(build_parser()[0]), *calls}
    assert names == set(EFFECTS) | set(ELSEWHERE) | set(SHOWS)
    assert len(names) == len(EFFECTS) + len(ELSEWHERE) + len(SHOWS)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_tests_elsewhere_exist(name: str) -> None:
    path, _, test = ELSEWHERE[name].partition("::")
    assert f"def {test}(" in (Path(__file__).parents[2] / path).read_text(encoding="utf-8")


def done(*arguments: str) -> str:
    """What a command prints in a process of its own; it must succeed."""
    command = [sys.executable, "-m", "streamchat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ)).stdout


@effect("sessions rename")
def test_a_renamed_session_has_its_title_in_the_database() -> None:
    session = stored()
    assert cli.main(["sessions", "rename", session, "The green sea"]) == 0
    assert rows("SELECT title FROM sessions WHERE id = ?", session) == [["The green sea"]]


@effect("sessions delete")
def test_no_byte_of_a_deleted_session_is_on_the_disk() -> None:
    """Not in tables, free pages, indexes, the log, the backups, or snapshots, as another program finds."""
    with talking() as talk:
        talk.turn("Tell me about xylophone")
        session = talk.session
    other = stored("The sea")
    for path in backup_folder(database_path()).iterdir():
        path.unlink()  # of the start of the chat: before the first turn
    assert back_up_daily(database_path()) is not None
    folder = str(database_path().parent)

    def files_with(word: str) -> list[str]:
        found = subprocess.run(["grep", "-rlai", word, folder], capture_output=True, text=True, check=False)
        return found.stdout.splitlines()

    assert len(files_with("xylophone")) == 2
    assert [path.stem for path in database_path().parent.rglob("*.safetensors")] == [session]
    assert cli.main(["sessions", "delete", session, "--yes"]) == 0
    assert files_with("xylophone") == []
    left = [path for path in database_path().parent.rglob("*") if session in path.name]
    assert [path for path in left if path.suffix != ".lock" or path.stat().st_size] == []  # locks are empty files
    assert rows("SELECT id FROM sessions") == [[other]]
    assert len(files_with("the sea")) == 2


@effect("sessions export")
def test_an_exported_session_is_whole_for_another_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = stored('the "sea" \\ é\u2028')
    file = tmp_path / "chat.jsonl"
    assert cli.main(["sessions", "export", session, "-o", str(file)]) == 0
    read = "import json, sys; print(json.dumps([json.loads(line) for line in open(sys.argv[1], encoding='utf-8')]))"
    text = json.dumps(other_process(read, str(file)))
    for message in said(session):
        assert json.dumps(message)[1:-1] in text
    capsys.readouterr()
    assert cli.main(["sessions", "export", session, "--format", "jsonl"]) == 0
    assert capsys.readouterr().out == file.read_text(encoding="utf-8")


@effect("sessions import")
def test_imported_messages_are_in_the_database(tmp_path: Path) -> None:
    file = tmp_path / "chats.json"
    messages = [{"role": "user", "content": "hello ☃"}, {"role": "assistant", "content": "good day"}]
    file.write_text(json.dumps([{"messages": messages}] * 2))
    assert cli.main(["sessions", "import", str(file), "--all"]) == 0
    ids = [session for (session,) in rows("SELECT id FROM sessions")]
    assert [said(session) for session in ids] == [["hello ☃", "good day"]] * 2


@effect("sessions restore-backup")
def test_a_restored_backup_is_the_database_for_another_process() -> None:
    session = stored("The sea")
    made = back_up_daily(database_path())
    assert made is not None
    stored("The dragon")
    assert cli.main(["sessions", "restore-backup", made.name, "--yes"]) == 0
    assert rows("SELECT id, title FROM sessions") == [[session, "The sea"]]
    assert rows("PRAGMA integrity_check") == [["ok"]]
    [aside] = database_path().parent.glob("*.damaged-" + "[0-9]" * 8 + "-" + "[0-9]" * 6)
    assert {title for (title,) in rows("SELECT title FROM sessions", database=aside)} == {"The sea", "The dragon"}


@effect("config")
def test_a_trusted_file_holds_in_the_next_process_until_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text("[streamchat]\n[sessions]\nsave = 'never'\n")

    def saves() -> Any:
        read = "import json, sys, tomllib; print(json.dumps(tomllib.loads(sys.argv[1])))"
        return other_process(read, done("config"))["sessions"].get("save")

    before = saves()
    assert before != "never"
    assert cli.main(["config", "--trust"]) == 0
    assert saves() == "never"
    assert cli.main(["config", "--untrust"]) == 0
    assert saves() == before


@effect("POST /v1/chat/completions")
def test_a_completion_is_a_saved_session(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        api.complete([{"role": "user", "content": "hello from a client"}])
    assert ["hello from a client"] in rows("SELECT text FROM messages", database=tmp_path / "sessions.db")


@effect("POST /v1/responses")
def test_a_response_continues_the_saved_session_that_its_id_names(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        first = api.respond("hello")
        api.respond("and now?", first["id"])
        api.respond("another one")
    query = "SELECT session, text FROM messages JOIN turns ON turns.id = turn WHERE role = 'user' ORDER BY messages.id"
    found = rows(query, database=tmp_path / "sessions.db")
    assert [text for _, text in found] == ["hello", "and now?", "another one"]
    assert [found[0][0] == session for session, _ in found] == [True, True, False]
