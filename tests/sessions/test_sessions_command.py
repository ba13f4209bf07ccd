"""`streamchat sessions` and `--resume`: listing, exporting, importing, and every way to ask for the wrong thing."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from streamchat.base import paths
from streamchat.base.errors import StoreError
from streamchat.cli import main as cli
from streamchat.sessions.transcripts.export import export
from streamchat.sessions.transcripts.imported import read_sessions
from streamchat.store.lock import SessionLock
from streamchat.store.records import CacheMark
from streamchat.store.store import Store
from tests.support.saved_sessions import saved

ONE = b'{"messages": [{"role": "user", "content": "a"}]}'


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["sessions", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys) == (0, "No saved sessions yet; `streamchat` starts one.\n", "")
    first, second = saved("The sea"), saved("Dragons", turns=1)
    code, out, _ = run(capsys)
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == [second, first]
    assert "1 turn  SmolLM2  Dragons" in lines[0]
    assert "3 turns  SmolLM2  The sea" in lines[1]
    with Store() as store:
        store.mark_open(first)
        lock = SessionLock(store.lock_folder, first)
    assert run(capsys, "list", "sea")[1].rstrip().endswith("The sea  (open)")
    lock.release()
    assert run(capsys, "list", "whale")[1] == "No saved session contains 'whale'.\n"
    assert run(capsys, "list", "--limit", "1")[1].endswith("... and more; --limit N shows them\n")
    record = json.loads(run(capsys, "list", "--json", "sea")[1])
    assert (record["id"], record["turns"], record["tokens_held"], record["open"]) == (first, 3, 24, False)


def test_showing_marks_what_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    session = saved(held=((0, 4), (19, 34)))
    _, out, _ = run(capsys, "show", session[:3])
    assert "1. you (evicted)\nquestion 1" in out
    assert "2. you (partly evicted)\nquestion 2" in out
    assert "3. you\nquestion 3" in out
    assert "3 turns, 19 tokens in the cache, 1 compression\n" in out


def test_renaming_and_deleting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    session = saved()
    assert run(capsys, "rename", session, " A  new\nname ")[1] == f"{session} is now named “A new name”.\n"
    for title, sentence in (
        ("  ", "a title needs at least one visible character"),
        ("\u200b\x1b[1m", "a title needs at least one visible character"),
        ("x" * 201, "a title of 201 characters is too long; use at most 200"),
    ):
        code, _, err = run(capsys, "rename", session, title)
        assert (code, sentence in err) == (2, True), err
    assert run(capsys, "rename", session, "x" * 200)[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = run(capsys, "delete", session)
    assert (code, "cannot be undone; give --yes" in err) == (2, True)
    lock = SessionLock(Store().lock_folder, session)
    code, _, err = run(capsys, "delete", session, "--yes")
    assert (code, "is open in another streamchat process; close it there first" in err) == (5, True)
    lock.release()
    assert run(capsys, "delete", session, "--yes")[:2] == (0, f"{session} was deleted.\n")
    assert run(capsys, "show", session)[0] == 5


def test_markdown_marks_the_edge_of_memory() -> None:
    session = saved(turns=4, held=((0, 4), (24, 44)))
    with Store() as store:
        text = export(store.load(session), "markdown")
    edge = text.index("*The model's context starts here")
    assert text.index("answer *2*") < edge < text.index("question 3")
    assert text.startswith("# The sea\n\nSmolLM2, ")
    assert "## System prompt\n\nBe kind.\n" in text
    # nothing is forgotten: no edge
    whole = saved(turns=2, held=((0, 24),))
    with Store() as store:
        assert "context starts here" not in export(store.load(whole), "markdown")
    # a pinned turn above the edge is no edge
    with Store() as store:
        store.write(session, cache=CacheMark(((0, 14), (24, 44)), ((0, 14),), (), 1))
        text = export(store.load(session), "markdown")
    assert "## 1. You (pinned)" in text
    assert text.index("answer *2*") < text.index("*The model's context starts here") < text.index("question 3")


def test_exporting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    session = saved()
    file = tmp_path / "sea.jsonl"
    code, out, err = run(capsys, "export", "last", "--format", "jsonl", "-o", str(file))
    assert (code, out) == (0, "")
    assert "3 turns were written to" in err
    assert file.stat().st_mode & 0o077 == 0
    code, _, err = run(capsys, "export", "last", "-o", str(file))
    assert (code, "already exists; choose another name" in err) == (5, True)
    code, _, err = run(capsys, "export", "last", "-o", str(tmp_path / "nowhere" / "x.md"))
    assert (code, "cannot be written (No such file or directory)" in err) == (5, True)
    _, out, _ = run(capsys, "export", session, "--format", "replay")
    assert [message["role"] for message in json.loads(out)["messages"]] == ["system", *["user", "assistant"] * 3]


@pytest.mark.parametrize("kind", ["jsonl", "replay"])
def test_importing_what_was_exported(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    session = saved("Naïve 👩‍🚀")
    file = tmp_path / "sea.jsonl"
    run(capsys, "export", session, "--format", kind, "-o", str(file))
    code, out, _ = run(capsys, "import", str(file))
    new = out.split(":")[0]
    assert code == 0
    assert f"--resume {new}" in out
    with Store() as store:
        before, after = store.load(session), store.load(new)
    assert [(t.number, t.text, t.reply) for t in after.turns] == [(t.number, t.text, t.reply) for t in before.turns]
    assert after.info.settings["system_prompt"] == "Be kind."
    assert after.info.tokenizer == ""
    if kind == "jsonl":
        assert after.info.title == before.info.title
        assert after.info.settings == before.info.settings
        assert [turn.started for turn in after.turns] == [turn.started for turn in before.turns]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"role": "user", "content": "a"}\n{"role": "user"', "line 2: this is not JSON (column 16: "),
        (b"[1]", "line 1: it is JSON, a number; accepted formats: "),
        (b'{"role": "robot", "content": "a"}', 'line 1: unknown role "robot"'),
        (
            b'{"role": "user", "content": 7}',
            "line 1: the content of a message from user must be a string, not a number",
        ),
        (b'{"mapping": {}, "title": "t"}', 'line 1: it is JSON, an object with "mapping", "title"; accepted formats: '),
        (b'[\n{"messages": []},\n{"messages": [{"role": "x", "content": ""}]}]', 'line 3: unknown role "x"'),
        (b"\n".join([ONE] * 2), "has 2 conversations; --all imports each as a session, --pick N or --pick TITLE some"),
        (b"Hello there", "file.jsonl: it is plain text, not JSON; nothing was imported"),
        (b'{"messages": ["hello"]}', 'line 1: a message needs "role"'),
        (b'{"streamchat": 7}', "unknown format 7; this streamchat reads format 1"),
        (b'{"streamchat": "' + b"x" * 500 + b'"}', 'unknown format "' + "x" * 36 + "...; this streamchat"),
        (b"\n\n", "has no messages"),
        (b"caf\xe9", "is not UTF-8 text"),
        (b"\xff\xfe{\0", "starts like JSON but is invalid: line 1, column 2"),
        (b"[" * 100_000, "starts like JSON but is invalid: it is nested too deeply; nothing was imported"),
        (
            b"[note] hello",
            "starts like JSON but is invalid: line 1, column 2: Expecting value; nothing was imported",
        ),
        (b"null", "file.jsonl, line 1: it is JSON, null; accepted formats: "),
        (b'"hello"', "file.jsonl, line 1: it is JSON, a string; accepted formats: "),
    ],
)
def test_what_cannot_be_imported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, sentence: str
) -> None:
    file = tmp_path / "file.jsonl"
    file.write_bytes(content)
    code, _, err = run(capsys, "import", str(file))
    assert code == 5
    assert sentence in err
    assert err.count("\n") == 1
    with Store() as store:
        assert store.sessions() == []


def test_importing_pairs_up_messages(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    rows = [("assistant", "hello"), ("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")]
    file.write_text("\ufeff" + "".join(json.dumps({"role": r, "content": c}) + "\n" for r, c in rows), encoding="utf-8")
    turns = read_sessions(file)[0].turns
    assert [(t.number, t.text, t.reply) for t in turns] == [(1, "", "hello"), (2, "a\n\nb", "c\n\nd"), (3, "e", "")]
    with pytest.raises(StoreError, match="missing: no such file; nothing was imported"):
        read_sessions(tmp_path / "missing")


def test_importing_keeps_why_replies_ended(tmp_path: Path) -> None:
    session = saved()
    reasons = ["stop", "length", "cancelled"]
    with Store() as store:
        turns = [
            replace(turn, finish_reason=reason) for turn, reason in zip(store.load(session).turns, reasons, strict=True)
        ]
        store.write(session, turns=turns)
        text = export(store.load(session), "jsonl")
    file = tmp_path / "file.jsonl"
    file.write_text(text, encoding="utf-8")
    assert [turn.finish_reason for turn in read_sessions(file)[0].turns] == reasons
    for odd in ('"asleep"', "7", "[1]", "{}", "null"):
        file.write_text(text.replace('"length"', odd), encoding="utf-8")
        assert [turn.finish_reason for turn in read_sessions(file)[0].turns] == ["stop", None, "cancelled"]


@pytest.mark.parametrize("name", ["last", "zzzzzz"])
def test_resuming_what_is_not_there_fails_at_once(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code = cli.main(["--resume", name, "--plain"])
    assert code == 5
    err = capsys.readouterr().err
    assert err.startswith("streamchat: no ")
    assert err.count("\n") == 1


def test_resuming_what_is_open_elsewhere_fails_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    session = saved()
    with Store() as store:
        store.mark_open(session, 4711)
        lock = SessionLock(store.lock_folder, session)
    assert cli.main(["--resume"]) == 5
    assert "is open in another streamchat process (id 4711); close it there" in capsys.readouterr().err
    lock.release()


def test_unknown_actions_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "lsit")
    assert code == 2
    assert "lsit" in err


def test_an_export_that_fails_leaves_no_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    session = saved()
    monkeypatch.setattr(paths, "fsync", full)
    code, _, said = run(capsys, "export", session, "--output", str(tmp_path / "out.md"))
    assert code == 5
    assert "out.md cannot be written (No space left on device)" in said
    assert list(tmp_path.glob("*.md*")) == []
