"""Backups, restoring them, and deleting for good: no word of a deleted conversation is in any file."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamchat.base import atomic_files, paths
from streamchat.base.errors import StoreError
from streamchat.cli import main as cli
from streamchat.commands import session_files
from streamchat.commands.doctor_store import examine_database
from streamchat.sessions.upkeep import Upkeep
from streamchat.store import backup as backing
from streamchat.store import restore as restoring
from streamchat.store import schema
from streamchat.store import scrub as scrubbing
from streamchat.store.backup import back_up_daily, backup_folder, backups, is_due, newest_sound_backup, problem_of
from streamchat.store.connection import connect
from streamchat.store.database import database_path
from streamchat.store.health import examine
from streamchat.store.restore import delete_from_backups, restore, set_aside
from streamchat.store.scrub import mark_pending, pending_mark
from streamchat.store.store import Store
from tests.support.saved_sessions import a_session, a_turn, filled

TODAY = "2026-03-14"


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests may run at midnight."""
    monkeypatch.setattr(backing, "date_of_today", lambda: TODAY)


@pytest.fixture
def path() -> Path:
    return database_path()


def titles(path: Path) -> list[str]:
    with Store(path) as store:
        return sorted(info.title for info in store.sessions())


def damage(path: Path) -> None:
    """Overwrite the middle of it, as a failing disk does."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["sessions", *argv])
    out, err = capsys.readouterr()
    return code, out, err


# --- making them ------------------------------------------------------------------------------------------------


def test_a_backup_is_one_private_sound_file(path: Path) -> None:
    filled(path, "sea")
    with Store(path):  # somebody has it open, with a log
        made = back_up_daily(path)
    assert made == backup_folder(path) / f"streamchat-{TODAY}.db"
    assert os.listdir(made.parent) == [made.name]
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert made.read_bytes()[18:20] == b"\x01\x01"  # no log belongs to it
    assert problem_of(backups(path)[0]) == ""
    with Store(made) as store:
        assert [found.title for found in store.search("seaword")] == ["sea"]
        assert examine(store.path).problems == []


def test_a_backup_is_made_once_a_day_and_only_after_a_change(path: Path) -> None:
    filled(path, "sea")
    assert is_due(path, "2030-01-01")
    assert back_up_daily(path) is not None
    assert back_up_daily(path) is None
    assert not is_due(path, "2030-01-02")  # unchanged
    time.sleep(0.02)
    filled(path, "hill")
    assert not is_due(path)  # there is one of today
    assert is_due(path, "2030-01-02")


def test_the_newest_seven_days_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, "sea")
    folder = backup_folder(path)
    folder.mkdir()
    for day in range(1, 11):
        old = folder / f"streamchat-2025-03-{day:02}.db"
        old.write_bytes(b"x")
        os.utime(old, (1e9 + day, 1e9 + day))
    (folder / "streamchat-notes.txt").write_text("the user's own")
    back_up_daily(path)
    names = sorted(os.listdir(folder))
    assert names == [
        *(f"streamchat-2025-03-{day:02}.db" for day in range(5, 11)),
        f"streamchat-{TODAY}.db",
        "streamchat-notes.txt",
    ]


def test_backups_of_a_wrong_clock_do_not_keep_others_from_being_made(path: Path) -> None:
    """A clock that was ahead leaves backups with moments to come: the first to be deleted, the last to be restored."""
    filled(path, "sea")
    folder = backup_folder(path)
    for day in range(1, 10):
        made = back_up_daily(path)
        assert made is not None
        ahead = folder / f"streamchat-2099-03-{day:02}.db"
        os.rename(made, ahead)
        os.utime(ahead, (4e9 + day, 4e9 + day))
    filled(path, "hill")
    made = back_up_daily(path)
    assert made is not None
    assert [backup.name for backup in backups(path)] == [
        made.name,
        *(f"streamchat-2099-03-{day:02}.db" for day in range(9, 3, -1)),
    ]
    assert newest_sound_backup(path) == backups(path)[0]
    assert back_up_daily(path) is None


def test_what_is_no_file_is_no_backup(path: Path) -> None:
    """Opening a FIFO waits for whoever writes into it."""
    filled(path, "sea")
    folder = backup_folder(path)
    folder.mkdir()
    os.mkfifo(folder / "streamchat-2025-03-01.db")
    (folder / "streamchat-2025-03-02.db").mkdir()
    (folder / "streamchat-2025-03-03.db").symlink_to("/dev/zero")
    assert backups(path) == []


def test_a_failed_backup_leaves_the_ones_there_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, "sea")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths, "fsync", full)
    with pytest.raises(StoreError, match=r"failed: No space left on device; free some disk space$"):
        back_up_daily(path)
    assert os.listdir(backup_folder(path)) == []
    monkeypatch.undo()
    monkeypatch.setenv("STREAMCHAT_HOME", str(path.parents[1]))
    assert back_up_daily(path) is not None


def test_a_backup_that_is_given_up_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, "sea")
    monkeypatch.setattr(backing, "PAGES", 1)
    assert back_up_daily(path, lambda: True) is None
    assert os.listdir(backup_folder(path)) == []


def test_writes_go_on_while_a_backup_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backup has the state at its beginning, and needs one pass only."""
    with Store(path) as store:
        session = a_session(store, "long")
        store.write(session, turns=[a_turn(n, "word " * 2000) for n in range(1, 40)])
        monkeypatch.setattr(backing, "PAGES", 1)
        looks = 0

        def look() -> bool:
            nonlocal looks
            looks += 1
            store.write(session, turns=[a_turn(40 + looks, "meanwhile")])  # fails if the backup holds a lock
            return False

        made = back_up_daily(path, look)
        assert made is not None
        with Store(made) as copy:
            assert len(copy.load(session).turns) == 39
        assert len(store.load(session).turns) == 39 + looks > 60


def test_a_damaged_database_is_not_backed_up(path: Path) -> None:
    filled(path, *(f"t{n}" for n in range(30)))
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET rootpage = 3 WHERE name = 'turns_by_number'")
    connection.close()
    with pytest.raises(StoreError, match="failed: the database is damaged"):
        back_up_daily(path)
    assert os.listdir(backup_folder(path)) == []


def test_a_migration_is_backed_up_under_its_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database of version 1 opens, and stays as it was in the backup."""
    path.parent.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        filled(path, "old")
    assert backups(path) == []  # a new database has nothing to back up
    assert titles(path) == ["old"]
    [backup] = backups(path)
    assert backup.name == "streamchat-schema-1.db"
    with sqlite3.connect(backup.path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 1
        assert connection.execute("SELECT title FROM sessions").fetchall() == [("old",)]
    connection.close()
    with Store(path) as store:
        assert examine(store.path).problems == []
        assert store._open.writer.execute("PRAGMA user_version").fetchone()[0] == len(schema.MIGRATIONS) > 1


def test_a_program_that_comes_second_keeps_the_backup_of_the_first(path: Path) -> None:
    """Both saw version 1; when the second one may make its backup, the tables have changed already."""
    filled(path, "sea")
    first = backup_folder(path) / "streamchat-schema-1.db"
    first.parent.mkdir()
    first.write_bytes(b"of the first one")
    backing.back_up_before_migration(path, 1)
    assert first.read_bytes() == b"of the first one"
    assert os.listdir(first.parent) == [first.name]


def test_a_full_disk_does_not_keep_a_database_from_its_migration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        filled(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths, "fsync", full)
    assert titles(path) == ["old"]
    assert backups(path) == []


# --- restoring --------------------------------------------------------------------------------------------------


def test_a_damaged_database_names_its_backup_and_the_command_that_helps(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(path, "sea", "hill")
    back_up_daily(path)
    path.write_bytes(b"no database any more " * 500)
    broken = path.read_bytes()
    code, _, err = run(capsys, "list")
    assert code == 5
    command = f"`streamchat sessions restore-backup streamchat-{TODAY}.db`"
    assert command in err
    assert "Traceback" not in err
    code, out, _ = run(capsys, "restore-backup", f"streamchat-{TODAY}.db")
    assert code == 0
    assert out.startswith("Restored the backup of ")
    assert "with 2 sessions." in out
    assert titles(path) == ["hill", "sea"]
    [aside] = set_aside(path)
    assert aside.read_bytes() == broken
    assert str(aside) in out


def test_the_newest_sound_backup_is_restored_by_default(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(path, "sea")
    made = back_up_daily(path)
    assert made is not None
    older = made.with_name("streamchat-2025-01-01.db")
    os.rename(made, older)
    filled(path, "hill")
    newest = back_up_daily(path)
    assert newest is not None
    damage(newest)
    assert newest_sound_backup(path) is not None
    found = newest_sound_backup(path)
    assert found is not None
    assert found.path == older
    out = run(capsys, "backups")[1].splitlines()
    assert out[0].startswith(newest.name)
    assert "(damaged: " in out[0]
    assert out[1].startswith(older.name)
    assert "damaged" not in out[1]
    code, _, err = run(capsys, "restore-backup", newest.name, "--yes")
    assert (code, "cannot be restored" in err) == (5, True)
    assert titles(path) == ["hill", "sea"]
    assert run(capsys, "restore-backup", "--yes")[0] == 0
    assert titles(path) == ["sea"]


def test_nothing_is_restored_under_a_running_chat(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(path, "sea")
    back_up_daily(path)
    code = f"from pathlib import Path; from streamchat.store.store import Store; s = Store(Path({str(path)!r}))"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('open', flush=True); input(); s.close()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        before = sorted(os.listdir(path.parent))
        exit_code, _, err = run(capsys, "restore-backup", "--yes")
        assert (exit_code, "is open in another streamchat process; close it there first" in err) == (5, True)
        assert sorted(os.listdir(path.parent)) == before
    finally:
        other.communicate("\n", timeout=30)
    assert run(capsys, "restore-backup", "--yes")[0] == 0


def test_a_sound_database_is_only_replaced_when_asked_for(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, "sea")
    back_up_daily(path)
    filled(path, "hill")
    code, _, err = run(capsys, "restore-backup")
    assert (code, "the database is intact and has 2 sessions; give --yes" in err) == (2, True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert run(capsys, "restore-backup")[:2] == (1, "Nothing was restored.\n")
    assert titles(path) == ["hill", "sea"]
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert run(capsys, "restore-backup")[0] == 0
    assert titles(path) == ["sea"]


def test_a_database_without_conversations_does_not_use_up_the_backup_of_the_day(path: Path) -> None:
    with Store(path):
        pass
    assert back_up_daily(path) is None
    assert backups(path) == []
    filled(path, "sea")
    assert back_up_daily(path) is not None


def test_a_restoration_that_fails_leaves_the_database_in_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, "sea")
    back_up_daily(path)
    filled(path, "hill")
    before = path.read_bytes()
    rename = os.replace

    def failing(source: Path, target: Path) -> None:
        if target == path:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        restore(path, backups(path)[0])
    assert path.read_bytes() == before
    assert set_aside(path) == []
    assert titles(path) == ["hill", "sea"]


def test_a_restored_database_is_on_the_disk_before_the_other_one_is_moved(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two there is no database: that must be short."""
    filled(path, "sea")
    back_up_daily(path)
    flushed = paths.fsync
    there: list[bool] = []

    def slow(target: Path) -> None:
        if target.is_file():
            there.append(path.exists())
        flushed(target)

    monkeypatch.setattr(paths, "fsync", slow)
    restore(path, backups(path)[0])
    assert there[0]  # what the second call finds is on the disk already


def test_the_log_of_the_damaged_database_goes_with_it(path: Path) -> None:
    """A log that stayed would be read into the restored database."""
    filled(path, "sea")
    back_up_daily(path)
    code = (
        "import os, sys; from pathlib import Path; from tests.support.saved_sessions import filled; "
        f"from streamchat.store.store import Store; s = Store(Path({str(path)!r})); filled(s.path, 'late'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    log = Path(f"{path}-wal")
    assert log.stat().st_size > 0
    content = log.read_bytes()
    aside = restore(path, backups(path)[0])
    assert aside is not None
    assert Path(f"{aside}-wal").read_bytes() == content
    assert not log.exists()
    assert titles(path) == ["sea"]
    assert titles(aside) == ["late", "sea"]  # nothing of it is lost


def test_there_is_nothing_to_restore(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "backups") == (
        0,
        "No backups yet; one is made on each day with a chat.\n",
        "",
    )
    code, _, err = run(capsys, "restore-backup")
    assert (code, "no backup found in " in err) == (5, True)
    filled(path, "sea")
    back_up_daily(path)
    code, _, err = run(capsys, "restore-backup", "nope.db")
    assert (code, "no backup named 'nope.db'; `streamchat sessions backups` lists them" in err) == (5, True)


# --- deleting ---------------------------------------------------------------------------------------------------

SECRET = "xylophonequartz"
"""A word of the message, which the text and the index of words have."""


def where(folder: Path, word: str) -> list[str]:
    """Files that have the word, whole or as the index has it: without what it shares with the word before it."""
    pieces = [word.encode(), word[3:].encode(), word.encode("utf-16-le")]
    return sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and any(piece in file.read_bytes().lower() for piece in pieces)
    )


def test_no_file_has_a_word_of_a_deleted_conversation(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = filled(path, *(f"other{n}" for n in range(20)))
    with Store(path) as store:
        session = a_session(store, f"{SECRET} title", {"system_prompt": f"{SECRET} prompt"})
        store.write(session, turns=[a_turn(n, f"say {SECRET}{n} " * 300, f"it is {SECRET}") for n in range(1, 30)])
        store.write(session, undone_from=20, turns=[a_turn(20, f"{SECRET} again")])
        store.change(session, [("system_prompt", f"{SECRET} changed")], {"system_prompt": SECRET})
        store.write_live(session, {"text": SECRET})
        store.snapshot_path(session).parent.mkdir(exist_ok=True)
        store.snapshot_path(session).write_bytes(SECRET.encode())
    back_up_daily(path)
    os.rename(backups(path)[0].path, backup_folder(path) / "streamchat-2025-01-01.db")
    os.utime(backups(path)[0].path, (1e9, 1e9))
    back_up_daily(path)
    with Store(path):  # a chat has it open meanwhile: there is a log
        files = where(path.parent, SECRET)
        assert files == [
            "backups/streamchat-2025-01-01.db",
            f"backups/streamchat-{TODAY}.db",
            f"snapshots/{session}.safetensors",
            "streamchat.db",
        ]
        code, out, err = run(capsys, "delete", session, "--yes")
    assert (code, out, err) == (0, f"{session} was deleted, also from 2 backups.\n", "")
    assert where(path.parent, SECRET) == []
    assert not pending_mark(path).exists()
    with Store(path) as store:
        assert examine(store.path).problems == []
        assert sorted(info.id for info in store.sessions()) == sorted(others)
        assert len(store.search("other7")) == 2
    for backup in backups(path):
        assert problem_of(backup) == ""
        with Store(backup.path) as store:
            assert sorted(info.id for info in store.sessions()) == sorted(others)
            assert len(store.search("other7")) == 2


def test_the_next_start_removes_the_cache_of_a_deletion_that_was_interrupted(path: Path) -> None:
    """Also what a killed process left unfinished of it."""
    [kept, deleted] = filled(path, "sea", "hill")
    with Store(path) as store:
        folder = store.snapshot_path("").parent
        folder.mkdir()
        names = [f"{kept}.safetensors", f".{kept}.safetensors.0123.part"]
        for name in [*names, f"{deleted}.safetensors", f".{deleted}.safetensors.0123.part", ".tmpX1y2Z3"]:
            (folder / name).write_bytes(b"keys and values")
        mark_pending(path)
        with store._open.write() as connection:
            connection.execute("DELETE FROM sessions WHERE id = ?", (deleted,))
    assert kept_up(path) == []
    assert sorted(os.listdir(folder)) == sorted(names)
    assert not pending_mark(path).exists()


def test_a_cache_that_cannot_be_removed_is_removed_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [session] = filled(path, "sea")
    with Store(path) as store:
        snapshot = store.snapshot_path(session)
        snapshot.parent.mkdir()
        snapshot.touch()
        with monkeypatch.context() as patch:
            patch.setattr(paths, "fsync", lambda path: None)
            patch.setattr(Path, "unlink", failing_unlink)
            assert not store.delete(session)
        assert (store.sessions(), snapshot.exists(), pending_mark(path).exists()) == ([], True, True)
        assert store.scrub()
    assert not snapshot.exists()


def failing_unlink(path: Path, missing_ok: bool = False) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_the_empty_log_is_flushed_before_the_mark_of_a_deletion_goes(path: Path) -> None:
    """SQLite does not flush its new size: a power failure could bring the text back."""
    [session] = filled(path, "sea")
    statements: list[str] = []
    with Store(path) as store:
        store._open.writer.set_trace_callback(statements.append)
        assert store.delete(session)
        store._open.writer.set_trace_callback(None)
        assert Path(f"{path}-wal").stat().st_size > 0
    after = statements[statements.index("PRAGMA wal_checkpoint(TRUNCATE)") + 1 :]
    assert any(statement.startswith("PRAGMA user_version = ") for statement in after)


@pytest.mark.parametrize("has_links", [True, False])
def test_there_is_always_a_database_while_a_backup_is_restored(
    path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """A power failure in between left none, and the next start made an empty one."""
    filled(path, "sea")
    back_up_daily(path)
    filled(path, "hill")
    replace = os.replace

    def fail(source: str | Path, target: str | Path) -> None:
        if Path(target) == path and Path(source).suffix == ".part":
            assert path.exists() or not has_links
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "replace", fail)
    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="free some disk space"):
        restore(path, backups(path)[0])
    assert (titles(path), set_aside(path)) == (["hill", "sea"], [])
    monkeypatch.undo()
    monkeypatch.setenv("STREAMCHAT_HOME", str(path.parent.parent))
    aside = restore(path, backups(path)[0])
    assert aside is not None
    assert (titles(path), titles(aside)) == (["sea"], ["hill", "sea"])


def test_a_restored_backup_is_not_reported_as_a_failure(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the files have changed places, nothing may fail any more."""
    filled(path, "sea", "hill")
    back_up_daily(path)

    def refuse(*_: object) -> None:
        raise StoreError("too many files are open")

    monkeypatch.setattr("streamchat.store.store.acquire", refuse)
    code, out, _ = run(capsys, "restore-backup", "--yes")
    assert (code, "with 2 sessions." in out) == (0, True)


def test_backups_can_be_left_alone_and_emptied_later(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [session, _] = filled(path, SECRET, "other")
    back_up_daily(path)
    code, out, _ = run(capsys, "delete", session, "--yes", "--keep-backups")
    assert code == 0
    assert out == (
        f"{session} was deleted.\n"
        "1 backup still contains it: daily backups are replaced over the next 7 days with a chat.\n"
    )
    assert where(path.parent, SECRET) == [f"backups/streamchat-{TODAY}.db"]
    code, _, err = run(capsys, "delete", session)
    assert (code, "cannot be undone; give --yes" in err) == (2, True)
    assert run(capsys, "delete", session, "--yes")[:2] == (0, f"{session} was deleted from 1 backup.\n")
    assert where(path.parent, SECRET) == []
    assert run(capsys, "delete", session, "--yes")[0] == 5


def test_what_cannot_be_emptied_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [session] = filled(path, SECRET)
    made = back_up_daily(path)
    assert made is not None
    damage(made)
    aside = path.with_name("streamchat.db.damaged-20250101-000000")
    aside.write_text(SECRET)
    code, out, err = run(capsys, "delete", session, "--yes")
    assert code == 5
    assert f"{aside}, a database that restore-backup moved aside, may still contain it; delete it yourself." in out
    assert f"the backup {made} may still contain it" in err
    assert titles(path) == []


def test_words_that_could_not_leave_at_once_leave_later(path: Path) -> None:
    """Another program reads meanwhile, so the log cannot be emptied."""
    [session, _] = filled(path, SECRET, "other")
    reader = connect(path)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM sessions").fetchone()
    with Store(path) as store:
        store._open.writer.execute("PRAGMA busy_timeout = 50")
        assert not store.delete(session)
        assert pending_mark(path).exists()
        reader.close()
        assert store.scrub()
    assert where(path.parent, SECRET) == []
    assert not pending_mark(path).exists()


def test_a_deletion_waits_for_a_backup_that_is_being_made(path: Path) -> None:
    """A backup that begins before and ends after the deletion has the conversation."""
    [session] = filled(path, SECRET)
    import threading

    entered, leave = threading.Event(), threading.Event()

    def hold() -> bool:
        entered.set()
        return not leave.wait(20)

    worker = threading.Thread(target=back_up_daily, args=(path, hold))
    worker.start()
    assert entered.wait(20)
    deleting = threading.Thread(target=delete_from_backups, args=(path, session))
    deleting.start()
    deleting.join(0.3)
    assert deleting.is_alive()
    leave.set()
    worker.join()
    deleting.join()
    assert where(backup_folder(path), SECRET) == []


# --- upkeep -----------------------------------------------------------------------------------------------------


def kept_up(path: Path) -> list[str]:
    """What the upkeep of a chat that begins and ends has said."""
    said: list[str] = []
    with Store(path) as store:
        upkeep = Upkeep(store, lambda event: said.append(getattr(event, "text", "")))
        upkeep.start_if_due()
        assert upkeep._worker is not None
        upkeep._worker.join()
        upkeep.start_if_due()  # once a day, unless there was nothing to save
        if store.sessions():
            assert not upkeep._worker.is_alive()
        upkeep.stop()
    return said


def test_a_chat_makes_the_backup_and_removes_what_was_left(path: Path) -> None:
    [session, _] = filled(path, SECRET, "other")
    with Store(path) as store:
        mark_pending(path)
        with store._open.write() as connection:  # as a deletion that was killed behind its first step
            connection.execute("DELETE FROM sessions WHERE id = ?", (session,))
    assert where(path.parent, SECRET) == ["streamchat.db"]
    assert kept_up(path) == []
    assert where(path.parent, SECRET) == []
    assert [backup.name for backup in backups(path)] == [f"streamchat-{TODAY}.db"]


def test_the_first_backup_of_a_new_database_has_the_first_turn(path: Path) -> None:
    """A backup without a conversation would be the only one of that day, and what is restored by default."""
    assert kept_up(path) == []
    assert backups(path) == []
    with Store(path) as store:
        upkeep = Upkeep(store, lambda event: None)

        def look() -> list[str]:
            upkeep.start_if_due()
            assert upkeep._worker is not None
            upkeep._worker.join()
            return [backup.name for backup in backups(path)]

        assert look() == []
        filled(path, "sea")
        assert look() == [f"streamchat-{TODAY}.db"]
        upkeep.stop()
    with Store(backups(path)[0].path) as store:
        assert [info.title for info in store.sessions()] == ["sea"]


def test_an_empty_database_beside_backups_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A database that was deleted is created anew; a week of new backups would replace those that have everything."""
    filled(path, "sea", "hill")
    made = back_up_daily(path)
    assert made is not None
    assert kept_up(path) == []
    path.unlink()
    [said] = kept_up(path)
    assert said == (
        f"{path} has no sessions, but its newest backup has 2; `streamchat sessions restore-backup {made.name}` "
        "restores it"
    )
    code, _, err = run(capsys, "list")
    assert (code, err) == (0, f"streamchat: {said}\n")
    problems: list[str] = []
    examine_database(problems)
    assert problems == [said]
    run(capsys, "restore-backup")
    assert run(capsys, "list")[2] == ""


def test_the_mark_of_a_deletion_is_on_the_disk_before_the_text_is_deleted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure the deletion may hold: then the text must still be known to be in the file."""
    flushed: list[Path] = []
    monkeypatch.setattr(paths, "fsync", flushed.append)
    mark_pending(path)
    mark, folder = flushed[-2:]  # after those of the new folders
    assert (mark.is_dir(), folder) == (False, pending_mark(path).parent)


def test_a_backup_that_fails_is_one_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, "sea")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths, "fsync", full)
    [said] = kept_up(path)
    assert said == (
        f"today's backup of {path} failed: No space left on device; free some disk space; the chat continues"
    )


def test_a_deletion_that_cannot_be_noted_is_one_sentence_and_deletes_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [session, _] = filled(path, "sea", "hill")
    write = atomic_files.write_text

    def failing(target: Path, text: str, *, durable: bool) -> None:
        if target == pending_mark(path):
            raise OSError(errno.EIO, "Input/output error")
        write(target, text, durable=durable)

    monkeypatch.setattr("streamchat.store.scrub.write_text", failing)
    code, _, err = run(capsys, "delete", session, "--yes")
    assert (code, err.startswith(f"streamchat: {path} cannot be used: Input/output error; ")) == (5, True)
    assert titles(path) == ["hill", "sea"]


def test_a_restored_backup_that_cannot_be_read_again_is_restored_all_the_same(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, "sea")
    back_up_daily(path)
    damage(path)
    move = restoring.restore

    def then_fail(database: Path, backup: backing.Backup) -> Path | None:
        moved = move(database, backup)
        monkeypatch.setattr(restoring, "open_backup", lambda path: sqlite3.connect(f"{path}/none"))
        return moved

    monkeypatch.setattr(session_files, "restore", then_fail)
    code, out, _ = run(capsys, "restore-backup", "--yes")
    assert (code, out.startswith("Restored the backup of ")) == (0, True)
    assert " session" not in out.partition("\n")[0]
    assert titles(path) == ["sea"]


def test_no_notice_about_a_backup_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path, "sea")
    made = back_up_daily(path)
    assert made is not None
    assert restoring.empty_database_notice(path).endswith(f"restore-backup {made.name}` restores it")
    monkeypatch.setattr(restoring, "open_backup", lambda path: sqlite3.connect(f"{path}/none"))
    assert restoring.empty_database_notice(path) == ""


def test_a_full_disk_does_not_undo_a_deletion(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [session, _] = filled(path, SECRET, "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scrubbing, "rewrite", _full)
        code, out, _ = run(capsys, "delete", session, "--yes")
        assert (code, "is using it, or the disk is full.\nThe next chat removes it." in out) == (0, True)
    assert titles(path) == ["other"]
    assert kept_up(path) == []
    assert where(path.parent, SECRET) == []


def _full(connection: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    raise error


def test_names_that_mean_something_in_addresses(tmp_path: Path) -> None:
    odd = tmp_path / "a?b#c%20d é & mode=memory" / "streamchat.db"
    filled(odd, "sea")
    assert odd.stat().st_size > 0
    made = back_up_daily(odd)
    assert made is not None
    assert titles(made) == titles(odd) == ["sea"]
