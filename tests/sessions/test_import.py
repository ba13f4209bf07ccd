"""Importing several conversations: which, by what name, all or none, by the command and in a chat."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ExitCode
from streamchat.cli import main as cli
from streamchat.sessions.transcripts import imported
from streamchat.sessions.transcripts.imported import read_sessions
from streamchat.store import writing
from streamchat.store.store import Store
from tests.support.app_driver import driving
from tests.support.desk import Desk
from tests.support.scripted_engine import ScriptedEngine


def talk(title: str | None, *texts: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A record of ShareGPT."""
    named = {} if title is None else {"title": title}
    return {**named, "conversations": [{"from": who, "value": text} for who, text in texts], **more}


TALKS = [
    talk("A trip", ("human", "Where to?"), ("chatgpt", "Rome.")),
    talk("Another trip", ("user", "And then?"), ("bing", "Paris.")),
    talk(None, ("system", "Be brief."), ("human", "\nName a color.\nNow."), ("bard", "Blue.")),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "all talks.json"
    path.write_text(json.dumps(TALKS), encoding="utf-8")
    return path


def titles() -> list[str]:
    with Store() as store:
        return sorted(info.title for info in store.sessions())


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["sessions", "import", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_several_conversations_must_be_chosen(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, file)
    assert (code, out, titles()) == (ExitCode.STORE, "", [])
    assert "--all imports each as a session, --pick N or --pick TITLE some of them, and --list lists them" in err
    code, out, err = run(capsys, file, "--list")
    rows = ["   1.      1 turn  A trip", "   2.      1 turn  Another trip", "   3.      1 turn  Name a color."]
    assert (code, out.splitlines(), err, titles()) == (ExitCode.OK, rows, "", [])
    code, out, _ = run(capsys, file, "--all")
    assert (code, out.count("1 turn was imported, “"), out.count("\n")) == (ExitCode.OK, 3, 3)
    assert titles() == ["A trip", "Another trip", "Name a color."]


@pytest.mark.parametrize(
    ("picked", "found"),
    [
        (["2"], ["Another trip"]),
        (["a TRIP"], ["A trip"]),  # the whole title precedes a part of another one
        (["trip"], ["A trip", "Another trip"]),
        (["3", "color", "1"], ["A trip", "Name a color."]),
    ],
)
def test_a_number_or_a_part_of_a_title_picks(
    file: Path, capsys: pytest.CaptureFixture[str], picked: list[str], found: list[str]
) -> None:
    code, out, _ = run(capsys, file, *(word for each in picked for word in ("--pick", each)))
    assert (code, out.count("\n"), titles()) == (ExitCode.OK, len(found), found)


@pytest.mark.parametrize(
    ("picked", "reason"),
    [
        ("4", "there is no conversation 4; the file has 3 conversations"),
        ("0", "there is no conversation 0; the file has 3 conversations"),
        ("ship", "no conversation of the file has 'ship' in its title"),
        (" ", "no conversation of the file has ' ' in its title"),
    ],
)
def test_what_cannot_be_picked_imports_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], picked: str, reason: str
) -> None:
    code, out, err = run(capsys, file, "--pick", "1", "--pick", picked)
    assert (code, out, titles()) == (ExitCode.STORE, "", [])
    assert err == f"streamchat: {file}: {reason}; --list lists them; nothing was imported\n"


def test_messages_of_tools_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tools.jsonl"
    rows: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]},
        {"role": "tool", "content": {"sun": 1}},
        {"role": "assistant", "content": "Sunny.", "tool_calls": [{"id": "c2"}]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run(capsys, path)
    assert (code, err) == (ExitCode.OK, "streamchat: only text can be imported; skipped: 3 tool messages\n")
    [session] = read_sessions(path)
    assert [(turn.text, turn.reply) for turn in session.turns] == [("Weather?", "Sunny.")]
    texts = [("human", "hi"), ("function_call", "f()"), ("observation", "4"), ("gpt", "4")]
    path.write_text(json.dumps(talk("t", *texts, tools="[f]")))
    [session] = read_sessions(path)
    assert (session.turns[0].reply, session.skipped["tool message"]) == ("4", 2)


def test_a_failure_in_the_middle_imports_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = writing.write_turn, []

    def full(connection: sqlite3.Connection, *rest: Any) -> None:
        written.append(rest)
        if len(written) == 3:
            raise sqlite3.OperationalError("database or disk is full")
        write(connection, *rest)

    monkeypatch.setattr(writing, "write_turn", full)
    code, out, err = run(capsys, file, "--all")
    assert (code, out, titles(), len(written)) == (ExitCode.STORE, "", [], 3)
    assert "full" in err
    assert err.count("\n") == 1


def test_a_file_that_is_too_large_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imported, "MAX_BYTES", 100)
    code, _, err = run(capsys, file, "--all")
    assert (code, titles()) == (ExitCode.STORE, [])
    assert "is too large (" in err
    assert "the limit is 100 B); use a part of it; nothing was imported" in err


def test_the_slash_command_lists_and_imports(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    desk = Desk()
    assert desk.say("/import").error
    assert desk.say("/import gone.json").text == "gone.json: no such file; nothing was imported"
    listed = desk.say('/import "all talks.json"')
    assert listed.text.splitlines()[0] == "   1.      1 turn  A trip"
    assert listed.text.splitlines()[-1].startswith('/import "all talks.json" N imports one')
    assert titles() == []
    refused = desk.say('/import "all talks.json" 9')
    assert (refused.error, titles()) == (True, [])
    one = desk.say('/import "all talks.json" another trip').text.splitlines()
    assert one[0].endswith(": 1 turn was imported, “Another trip”")
    assert one[-1] == f"/resume {one[0][:6]} resumes it"
    assert len(desk.say('/import "all talks.json" all').text.splitlines()) == 4
    assert titles() == ["A trip", "Another trip", "Another trip", "Name a color."]
    assert desk.offered("/import all") == []  # a name with spaces is typed in quotes
    (file.parent / "plain.json").touch()
    assert desk.offered("/import pl") == ["/import plain.json"]


async def test_the_app_imports(file: Path) -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.enter(f'/import "{file}" 2')
        await driver.until(lambda: any("“Another trip”" in line for line in driver.outputs), "the import")
        assert titles() == ["Another trip"]
        await driver.enter("/import /nowhere/x.json")
        await driver.until(lambda: any("/nowhere/x.json: no such file" in toast for toast in driver.toasts), "a toast")
