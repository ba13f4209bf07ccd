"""The database of saved conversations: what goes in comes out, in any state of the file and of the process."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ExitCode, SessionError, StoreError
from streamchat.store import schema
from streamchat.store.backup import Backup, problem_of
from streamchat.store.health import examine
from streamchat.store.lock import SessionLock, is_open
from streamchat.store.records import CacheMark, StoredEviction, pack_ids, unpack_ids
from streamchat.store.search import query_of
from streamchat.store.store import Store
from tests.support.saved_sessions import a_session, a_turn

EMOJI = "👩‍🚀 naïve 日本語 \x1b[31m \0 end"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as opened:
        yield opened


def test_ids_are_little_endian_int32() -> None:
    assert pack_ids([1, 256, -1, 2**31 - 1]) == b"\x01\0\0\0\0\1\0\0\xff\xff\xff\xff\xff\xff\xff\x7f"
    assert unpack_ids(pack_ids(range(1000))) == array("i", range(1000))


def test_what_is_written_is_read(store: Store) -> None:
    session = a_session(store, EMOJI)
    mark = CacheMark(((0, 4), (13, 23)), ((0, 3),), (13,), 2)
    before = CacheMark(((0, 4), (6, 13)), ((0, 3),), (3,), 1)
    turns = [a_turn(1, EMOJI, "reply " + EMOJI), a_turn(2, "two", "", state="running", before=before)]
    eviction = StoredEviction(2, 1002.5, "between_turns", ((4, 13),), 33, 24)
    store.write(session, turns=turns, cache=mark, evictions=[eviction])
    saved = store.load(session)
    assert list(saved.turns) == turns
    assert saved.evictions == (eviction,)
    assert saved.system_ids == array("i", [1, 2, 3])
    assert saved.damage == ()
    assert (saved.info.title, saved.info.held, saved.info.pins, saved.info.compressions, saved.info.turns) == (
        EMOJI,
        mark.held,
        mark.pins,
        2,
        2,
    )
    # the running turn grows
    grown = replace(turns[1], reply="and so", state="done", stats={"turn": 2, "ttft_s": None}, finish_reason="stop")
    store.write(session, turns=[grown])
    assert list(store.load(session).turns) == [turns[0], grown]
    # and shrinks again, where only a part of a character was there
    store.write(session, turns=[replace(grown, reply="")])
    assert store.load(session).turns[1].reply == ""
    assert examine(store.path).problems == []


def test_text_that_is_no_unicode_is_saved_all_the_same(store: Store) -> None:
    session = a_session(store, "bad \ud800")
    store.write(session, turns=[a_turn(1, "lone \udcff surrogate")])
    assert store.load(session).turns[0].text == "lone ? surrogate"


def test_undone_turns_are_found_by_words_and_nowhere_else(store: Store) -> None:
    session = a_session(store)
    store.write(session, turns=[a_turn(1, "one"), a_turn(2, "the kraken", "it sleeps")])
    store.write(session, evictions=[StoredEviction(2, 1.0, "decode", ((4, 5),), 5, 4)])
    store.write(session, undone_from=2, turns=[a_turn(2, "the whale", "it sings")])
    saved = store.load(session)
    assert [(turn.number, turn.text) for turn in saved.turns] == [(1, "one"), (2, "the whale")]
    assert saved.evictions == ()
    assert [(found.text, found.undone) for found in store.search("kraken")] == [("the kraken", True)]
    assert [(found.text, found.undone) for found in store.search("whale")] == [("the whale", False)]


def test_words_are_looked_for_literally(store: Store) -> None:
    session = a_session(store)
    texts = ["Don't stop; C++ & well-known", 'say "hello" NOT goodbye', "naïve café", "column: a* OR b", "日本語 text"]
    store.write(session, turns=[a_turn(i, text) for i, text in enumerate(texts, 1)])

    def found(words: str) -> list[int]:
        return sorted(each.turn for each in store.search(words))

    assert found("well-known") == [1]
    assert found("don't STOP") == [1]
    assert found("NOT") == [2]
    assert found('"hello NOT') == [2]
    assert found("cafe naive") == [3]
    assert found("OR b") == [4]
    assert found("a* OR") == [4]
    assert found("goo") == [2]  # the start of a word, while it is being typed
    assert found('"goo"') == []
    assert found("hello café") == []
    for nothing in ("", "   ", '"', "\0"):
        assert found(nothing) == []
        assert not query_of(nothing)


SCRIPTS = [
    "我喜欢东京的樱花",
    "ภาษาไทยไม่มีช่องว่าง",
    "日本語も同じです。🙂 café",
    "벚꽃을 보러 갔다",
    "100 % wool => 50_x, C:\\tmp",
    "plain words: Tokyo",
    "ㄅㄆㄇㄈ",
    "ꀀꀁꀂ",
    "I write C++ and C#, Ärger++",
    "I write C, a well known language",
]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("樱花", [1]),
        ("京", [1]),
        ("ไทย", [2]),
        ("同じ", [3]),
        ("벚꽃", [4]),
        ("同じ café", [3]),
        ("樱花 café", []),
        ('"我喜欢东京"', [1]),
        ("🙂", [3]),
        ("=>", [5]),
        ("%", [5]),
        ("=> wool", [5]),
        ("_", [5]),
        ("\\", [5]),
        ("###", []),
        ("tokyo", [6]),
        ("ㄆ", [7]),
        ("ꀁ", [8]),
        ("c++", [9]),
        ("C++ write", [9]),
        ('"c++ and"', [9]),
        ("c", [3, 5, 9, 10]),
        ("C#", [9]),
        ("100%", []),
        ("ärger++", [9]),
        ("well-known", [10]),
        ("well_", []),
    ],
)
def test_scripts_without_spaces_and_symbols_are_found(store: Store, words: str, expected: list[int]) -> None:
    session = a_session(store, "Sakura")
    other = a_session(store, "Nothing")
    store.write(session, turns=[a_turn(i, text) for i, text in enumerate(SCRIPTS, 1)])
    store.write(other, turns=[a_turn(1, "Hello")])
    assert sorted(each.turn for each in store.search(words)) == expected
    assert [info.id for info in store.sessions(words)] == ([session] if expected else [])


def test_an_excerpt_of_a_substring_shows_it(store: Store) -> None:
    session = a_session(store)
    store.write(session, turns=[a_turn(1, "前" * 500 + "\n樱花\n" + "后" * 500)])
    [found] = store.search("樱花")
    assert "前 樱花 后" in found.excerpt
    assert found.excerpt.startswith("…")
    assert found.excerpt.endswith("…")
    assert len(found.excerpt) < 200


def test_excerpts_are_one_short_line(store: Store) -> None:
    session = a_session(store)
    store.write(session, turns=[a_turn(1, "word\n\n" * 500 + "needle\nin " + "hay\n" * 500)])
    [found] = store.search("needle")
    assert "needle in hay" in found.excerpt
    assert "\n" not in found.excerpt
    assert len(found.excerpt) < 200


def test_finding_sessions(store: Store) -> None:
    ids = [a_session(store, title) for title in ("The sea", "100 % wool", "Dragons")]
    store.write(ids[0], turns=[a_turn(1, "about a dragon")])
    assert store.find("last").id == ids[0]  # the one that was written to last
    assert [info.id for info in store.sessions("dragon")] == [ids[0], ids[2]]
    assert [info.id for info in store.sessions("100 %")] == [ids[1]]
    assert [info.id for info in store.sessions()] == [ids[0], ids[2], ids[1]]
    assert store.find(ids[1].upper()).id == ids[1]
    with pytest.raises(SessionError, match="no saved session has the id 'zzz000'"):
        store.find("zzz000")
    with pytest.raises(SessionError, match="several sessions start with ''"):
        store.find("")


def test_an_empty_store_says_so(store: Store) -> None:
    assert store.sessions() == []
    with pytest.raises(SessionError, match="no session is saved yet") as raised:
        store.find("last")
    assert raised.value.exit_code == ExitCode.STORE.value == 5


def test_deleting_takes_all_of_it(store: Store) -> None:
    session = a_session(store)
    store.write(session, turns=[a_turn(1, "needle")], evictions=[StoredEviction(1, 1.0, "decode", ((4, 5),), 5, 4)])
    store.snapshot_path(session).parent.mkdir()
    store.snapshot_path(session).write_bytes(b"x")
    store.delete(session)
    assert store.search("needle") == []
    assert not store.snapshot_path(session).exists()
    for table in ("turns", "messages", "evictions"):
        assert store._open.writer.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0
    assert examine(store.path).problems == []


def test_files_are_private(path: Path, store: Store) -> None:
    a_session(store)
    for file in [path.parent, *path.parent.iterdir()]:
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file


# --- the file ---------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but somebody's file " * 50)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"is damaged; move it aside and a new one will be created"):
        Store(path)
    assert path.read_bytes() == before


def test_a_newer_file_is_refused(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"newer streamchat \(version 99 of its tables; this one knows 4\)"):
        Store(path)


@pytest.mark.parametrize("version", [-1, -(2**31)])
def test_a_damaged_version_is_refused_at_once(path: Path, version: int) -> None:
    """Each migration added 1 to it, which took hours."""
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    with pytest.raises(StoreError, match=rf"its tables have version {version}; the file is damaged; move it aside"):
        Store(path)
    assert problem_of(Backup(path, 0.0, path.stat().st_size)) == f"its tables have version {version}"
    assert examine(path).problems == [f"its tables have version {version}"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file in the place of the folder")
    with pytest.raises(StoreError, match="a file has the name of its folder"):
        Store(tmp_path / "data" / "streamchat.db")


def test_an_older_file_is_migrated_and_a_failed_step_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(path) as store:
        session = a_session(store)
        store.write(session, turns=[a_turn(1, "kept")])
    version = len(schema.MIGRATIONS)
    broken = "ALTER TABLE sessions ADD COLUMN mood TEXT; INSERT INTO nowhere VALUES (1);"
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, broken))
    with pytest.raises(StoreError, match="no such table: nowhere"):
        Store(path)
    good = "ALTER TABLE sessions ADD COLUMN mood TEXT NOT NULL DEFAULT 'calm';"
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS[:version], good))
    with Store(path) as store:
        assert store._open.writer.execute("PRAGMA user_version").fetchone()[0] == version + 1
        assert store._open.writer.execute("SELECT mood FROM sessions").fetchone()[0] == "calm"
        assert store.load(session).turns[0].text == "kept"


def test_many_may_open_a_new_file_at_once(path: Path) -> None:
    problems: list[BaseException] = []
    gate = threading.Barrier(8)

    def open_it() -> None:
        gate.wait()
        try:
            with Store(path) as store:
                a_session(store)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    with Store(path) as store:
        assert len(store.sessions()) == 8


def test_a_full_disk_writes_all_or_nothing(store: Store) -> None:
    session = a_session(store)
    store.write(session, turns=[a_turn(1, "one")])
    pages = store._open.writer.execute("PRAGMA page_count").fetchone()[0]
    store._open.writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="database or disk is full; free some disk space"):
        store.write(session, turns=[a_turn(2, "small"), a_turn(3, "x " * 20_000)])
    store._open.writer.execute("PRAGMA max_page_count = 100000")
    assert [turn.text for turn in store.load(session).turns] == ["one"]
    store.write(session, turns=[a_turn(2, "two")])
    assert len(store.load(session).turns) == 2


# --- processes --------------------------------------------------------------------------------------------------


def _hold(folder: Path, ready: Any, done: Any) -> None:
    lock = SessionLock(folder, "abc")
    ready.set()
    done.wait(30)
    lock.release()


def test_one_process_a_session(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "locks", ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(SessionError, match=r"abc is open in another streamchat process \(id 123\)"):
            SessionLock(tmp_path / "locks", "abc", 123)
        with Store(tmp_path / "x.db") as store:
            info = replace(store.find(a_session(store)), id="abc", opened_by=123)
        assert is_open(tmp_path / "locks", info)
        SessionLock(tmp_path / "locks", "other").release()
    finally:
        other.kill()
        other.join()
    # a process that was killed holds nothing
    SessionLock(tmp_path / "locks", "abc").release()
    assert not is_open(tmp_path / "locks", info)


def test_a_look_keeps_nobody_from_opening(tmp_path: Path) -> None:
    """The monitor looks every second."""
    with Store(tmp_path / "x.db") as store:
        free = store.find(a_session(store))
    assert not is_open(tmp_path / "locks", free)
    assert not (tmp_path / "locks" / f"{free.id}.lock").exists()
    # one that was killed is looked at through its lock, for a moment: who opens it then waits that long
    held = threading.Event()

    def look() -> None:
        lock = SessionLock(tmp_path / "locks", free.id)
        held.set()
        time.sleep(0.1)
        lock.release()

    threading.Thread(target=look).start()
    assert held.wait(10)
    SessionLock(tmp_path / "locks", free.id, patience_s=10).release()


def test_the_same_process_is_no_exception(tmp_path: Path) -> None:
    lock = SessionLock(tmp_path, "abc")
    with pytest.raises(SessionError):
        SessionLock(tmp_path, "abc")
    lock.release()
    SessionLock(tmp_path, "abc").release()


def test_no_torch_and_no_textual(path: Path) -> None:
    code = (
        "import sys; from streamchat.store.store import Store; import streamchat.sessions.transcripts.export; "
        "print([name for name in ('torch', 'textual', 'transformers') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert said.stdout.strip() == "[]"
