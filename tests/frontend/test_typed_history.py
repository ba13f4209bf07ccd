"""The history of what was typed: one file for app and prompt, and for several processes at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from filelock import FileLock

import tests
from streamchat.base import paths
from streamchat.frontend import typed_history
from streamchat.frontend.typed_history import MAX_ENTRIES, TypedHistory
from streamchat.repl.history import PromptToolkitHistory
from streamchat.tui.history import PromptHistory
from tests.support import scripted_face
from tests.support.app_driver import driving
from tests.support.scripted_engine import ScriptedEngine

OLD_STATE = Path(tests.__path__[0]) / "golden" / "0.1.0.dev1" / "state"
ODD = [
    *("two\nlines", "    indented", "a \\ backslash, “quotes” and Ünïcödé", "x\u2028y\x85z", "🙂"),
    *('{"text": "no"}', "+ plus", "# 2026"),
]


def file() -> Path:
    return paths.state_dir() / "typed.jsonl"


def reopened() -> list[str]:
    return TypedHistory.open(wanted=True).entries


def test_entries_are_kept_as_typed() -> None:
    history = TypedHistory.open(wanted=True)
    for text in ODD:
        history.add(text)
    assert history.problem == ""
    expected = [text.replace("\x85", "") for text in ODD]  # a control character
    assert history.entries == reopened() == expected
    assert stat.S_IMODE(file().stat().st_mode) == 0o600
    assert stat.S_IMODE(file().parent.stat().st_mode) == 0o700


def test_blank_text_and_repetitions_are_not_kept() -> None:
    history = TypedHistory.open(wanted=True)
    for text in ("one", "one\n", "  ", "\n", "two", "one", "\ud800"):
        history.add(text)
    assert reopened() == ["one", "two", "one", "\ufffd"]


def test_the_app_shows_what_was_typed_at_the_prompt_and_the_other_way() -> None:
    prompt = PromptToolkitHistory(TypedHistory.open(wanted=True))
    prompt.append_string("typed at the prompt")
    app = PromptHistory.open(wanted=True)
    assert app.older("") == "typed at the prompt"
    app.add("typed\nin the app")
    again = PromptToolkitHistory(TypedHistory.open(wanted=True))
    assert list(again.load_history_strings()) == ["typed\nin the app", "typed at the prompt"]


@pytest.mark.slow
async def test_up_in_the_app_and_at_a_real_prompt() -> None:
    async with driving(ScriptedEngine()) as driver:
        await driver.ask("typed in the app")
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    command = [str(scripted_face.__file__), json.dumps({"replies": ["first"]}), "--plain"]
    child = pexpect.spawn(sys.executable, command, timeout=20, dimensions=(24, 80), env=env)
    child.expect("you> ")
    child.send("\x1b[A")
    child.expect("typed in the app")
    child.send(" and\x1b\r at the prompt\r")  # Alt+Enter: a new line
    child.expect("first")
    child.expect("you> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    async with driving(ScriptedEngine()) as driver:
        await driver.pilot.press("up")
        assert driver.prompt.text == "typed in the app and\n at the prompt"


def test_history_can_be_off() -> None:
    TypedHistory.open(wanted=True).add("before")
    history = TypedHistory.open(wanted=False)
    assert history.entries == []
    history.add("secret")
    assert (history.entries, history.problem) == (["secret"], "")
    assert reopened() == ["before"]


# --- damage, permissions, size ----------------------------------------------------------------------------------


def test_damaged_lines_are_skipped_and_a_torn_one_harms_no_other() -> None:
    file().parent.mkdir(parents=True)
    deep = b'{"text": ' + b"[" * 100_000
    damaged = [b"{broken", b'["other"]', b'{"text": 5}', b'{"time": "noon", "text": "x"}', b"\xff\xfe", b"", b"null"]
    good = b'{"time": 5, "text": "good"}'
    file().write_bytes(b"\n".join([deep, *damaged, good, b'{"time": 6, "text": "cut o']))
    assert reopened() == ["good"]
    TypedHistory.open(wanted=True).add("next")
    assert reopened() == ["good", "next"]


def test_a_file_that_others_can_read_becomes_private() -> None:
    TypedHistory.open(wanted=True).add("one")
    file().chmod(0o644)
    TypedHistory.open(wanted=True).add("two")
    assert stat.S_IMODE(file().stat().st_mode) == 0o600


def test_the_oldest_entries_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    file().parent.mkdir(parents=True)
    lines = [json.dumps({"time": n, "text": f"entry {n}"}) for n in range(MAX_ENTRIES + 7)]
    file().write_text("\n".join(lines) + "\n")
    file().chmod(0o644)
    assert reopened() == [f"entry {n}" for n in range(7, MAX_ENTRIES + 7)]
    assert len(file().read_text().splitlines()) == MAX_ENTRIES
    assert stat.S_IMODE(file().stat().st_mode) == 0o600
    monkeypatch.setattr(typed_history, "MAX_CHARACTERS", 25)
    assert reopened() == [f"entry {n}" for n in (MAX_ENTRIES + 5, MAX_ENTRIES + 6)]


def test_a_very_long_entry_is_kept_while_it_is_the_newest_and_displaces_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(typed_history, "MAX_CHARACTERS", 80)
    monkeypatch.setattr(typed_history, "MAX_LENGTH", 10)
    history = TypedHistory.open(wanted=True)
    for text in ("one", "two", "x" * 90):
        history.add(text)
    assert reopened() == ["one", "two", "x" * 90]
    history.add("three")
    assert reopened() == ["one", "two", "three"]


def test_a_history_that_cannot_be_saved_is_one_sentence() -> None:
    paths.state_dir().parent.mkdir(parents=True, exist_ok=True)
    paths.state_dir().write_text("a file where a folder should be")
    history = TypedHistory.open(wanted=True)
    assert history.problem == f"input history is disabled: {file()} (File exists)"
    history.add("one")
    assert history.entries == ["one"]


def test_a_folder_that_cannot_be_written_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    TypedHistory.open(wanted=True).add("one")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    history = TypedHistory.open(wanted=True)
    assert history.entries == ["one"]
    assert "Permission denied" in history.problem


@pytest.mark.skipif(os.name == "nt", reason="needs limits of the system")
def test_a_disk_that_gets_full_while_an_entry_is_written_is_said_and_tears_no_line() -> None:
    import resource
    import signal

    history = TypedHistory.open(wanted=True)
    history.add("one")
    before = file().read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        history.add("two" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert history.problem == f"input history is disabled: {file()} (No space left on device)"
    assert file().read_bytes() == before


# --- several processes ------------------------------------------------------------------------------------------

WRITER = """
import sys
from streamchat.frontend import typed_history
typed_history.MAX_ENTRIES = 50
for number in range(80):
    history = typed_history.TypedHistory.open(wanted=True)
    history.add(f"{sys.argv[1]} {number}\\nsecond line")
"""
"""Each start drops the oldest entries, and so rewrites the file while the others append to it."""


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing() -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in "abcd"]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    entries = reopened()
    assert 50 <= len(entries) <= 54
    for name in "abcd":
        own = [text for text in entries if text.startswith(name)]
        assert own == [f"{name} {number}\nsecond line" for number in range(80 - len(own), 80)]


def test_an_entry_of_another_process_survives_a_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading and replacing the file nobody else can append."""
    one = TypedHistory.open(wanted=True)
    for text in ("a", "b", "c"):
        one.add(text)
    monkeypatch.setattr(typed_history, "MAX_ENTRIES", 2)
    held: list[bool] = []
    replace = os.replace

    def checked(*args: str) -> None:
        lock = FileLock(file().with_suffix(".lock"), timeout=0, is_singleton=False)
        try:
            lock.acquire()
        except TimeoutError:
            held.append(True)
        replace(*args)

    monkeypatch.setattr(os, "replace", checked)
    assert reopened() == ["b", "c"]
    assert held == [True]


def test_a_process_that_hangs_with_the_lock_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed_history, "PATIENCE_S", 0.05)
    TypedHistory.open(wanted=True).add("one")
    with FileLock(file().with_suffix(".lock"), is_singleton=False):
        TypedHistory.open(wanted=True).add("two")
        assert reopened() == ["one", "two"]


# --- the files of version 0.1 -----------------------------------------------------------------------------------


def write_old(app: str, prompt: str) -> None:
    paths.private_dir(paths.state_dir())
    (paths.state_dir() / "history.jsonl").write_text(app)
    (paths.state_dir() / "history").write_text(prompt)


@pytest.mark.parametrize("is_locked", [False, True])
def test_what_a_killed_process_left_is_removed_unless_another_one_may_be_writing_it(
    monkeypatch: pytest.MonkeyPatch, is_locked: bool
) -> None:
    """It has everything that was typed."""
    monkeypatch.setattr(typed_history, "PATIENCE_S", 0.05)
    TypedHistory.open(wanted=True).add("one")
    left = file().with_name(".typed.jsonl.0123abcd.part")
    left.write_text("secret")
    with FileLock(file().with_suffix(".lock")) if is_locked else contextlib.nullcontext():
        assert reopened() == ["one"]
        assert left.exists() is is_locked


def test_both_old_files_are_merged_in_order_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import time
    from datetime import datetime

    def at(second: int) -> int:
        return int(datetime(2026, 11, 25, 10, 0, second).timestamp())

    monkeypatch.setattr(time, "time", lambda: at(59))
    app = [{"time": at(10), "text": "app 1"}, {"time": at(30), "text": "app\n2"}, {"text": "app 3, without a time"}]
    write_old(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*app, {"time": at(50), "text": "app\u20284"}]),
        "\n# 2026-11-25 10:00:05.123456\n+prompt 1\n"
        "\n# 2026-11-25 10:00:20.5\n+prompt 2\n+\n+third line\n"
        "\n# not a time\n+prompt 3\n\n# 2026-11-25 10:00:40\n+prompt\u20284",
    )
    merged = [
        *("prompt 1", "app 1", "prompt 2\n\nthird line", "prompt 3", "app\n2", "app 3, without a time"),
        *("prompt\u20284", "app\u20284"),
    ]
    assert reopened() == merged
    records = [json.loads(line) for line in file().read_text().splitlines()]
    assert [record["text"] for record in records] == merged
    assert (records[0]["time"], records[1]["time"]) == (at(5) + 0.123, at(10))


def test_the_old_files_are_read_once_and_left_in_place() -> None:
    shutil.copytree(OLD_STATE, paths.private_dir(paths.state_dir()), dirs_exist_ok=True)
    first = reopened()
    assert len(first) == 6
    assert set(first) == set(json.loads((OLD_STATE.parent / "expected.json").read_text())["typed"])
    TypedHistory.open(wanted=True).add("new")
    with open(paths.state_dir() / "history.jsonl", "a") as old:
        old.write('{"time": 1795713999, "text": "typed in the old version later"}\n')
    assert reopened() == [*first, "new"]
    assert (paths.state_dir() / "history").read_bytes() == (OLD_STATE / "history").read_bytes()


def test_without_old_files_nothing_is_written_before_something_is_typed() -> None:
    assert reopened() == []
    assert not file().exists()
