"""Success means effect, for the commands of the command line and the calls of the API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamchat.cli import main as cli
from streamchat.store.backup import back_up_daily, backup_folder
from streamchat.store.database import database_path
from tests.support.api_server import serving
from tests.support.effects import other_process, rows, said, talking
from tests.support.saved_sessions import stored


def done(*arguments: str) -> str:
    """What a command prints in a process of its own; it must succeed."""
    command = [sys.executable, "-m", "streamchat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ)).stdout


def test_a_renamed_session_has_its_title_in_the_database() -> None:
    session = stored()
    assert cli.main(["sessions", "rename", session, "The green sea"]) == 0
    assert rows("SELECT title FROM sessions WHERE id = ?", session) == [["The green sea"]]


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


def test_imported_messages_are_in_the_database(tmp_path: Path) -> None:
    file = tmp_path / "chats.json"
    messages = [{"role": "user", "content": "hello ☃"}, {"role": "assistant", "content": "good day"}]
    file.write_text(json.dumps([{"messages": messages}] * 2))
    assert cli.main(["sessions", "import", str(file), "--all"]) == 0
    ids = [session for (session,) in rows("SELECT id FROM sessions")]
    assert [said(session) for session in ids] == [["hello ☃", "good day"]] * 2


def test_a_restored_backup_is_what_another_process_reads() -> None:
    session = stored("The sea")
    made = back_up_daily(database_path())
    assert made is not None
    stored("The dragon")
    assert cli.main(["sessions", "restore-backup", made.name, "--yes"]) == 0
    assert rows("SELECT id, title FROM sessions") == [[session, "The sea"]]
    assert rows("PRAGMA integrity_check") == [["ok"]]
    [aside] = database_path().parent.glob("*.damaged-" + "[0-9]" * 8 + "-" + "[0-9]" * 6)
    assert {title for (title,) in rows("SELECT title FROM sessions", database=aside)} == {"The sea", "The dragon"}


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


def test_a_completion_is_a_saved_session(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        api.complete([{"role": "user", "content": "hello from a client"}])
    assert ["hello from a client"] in rows("SELECT text FROM messages", database=tmp_path / "sessions.db")


def test_a_response_continues_the_saved_session_that_its_id_names(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        first = api.respond("hello")
        api.respond("and now?", first["id"])
        api.respond("another one")
    query = "SELECT session, text FROM messages JOIN turns ON turns.id = turn WHERE role = 'user' ORDER BY messages.id"
    found = rows(query, database=tmp_path / "sessions.db")
    assert [text for _, text in found] == ["hello", "and now?", "another one"]
    assert [found[0][0] == session for session, _ in found] == [True, True, False]
