"""The database file itself: who opens it, what happens when it goes away, threads, forks."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from streamchat.base.errors import StoreError
from streamchat.replay.chaos.kinds.disk import FullDisk
from streamchat.store import database as databases
from streamchat.store import failures
from streamchat.store.connection import LOG_BYTES, connect, create_private
from streamchat.store.database import acquire, release
from streamchat.store.health import HealthReport, examine
from streamchat.store.store import Store
from tests.support.saved_sessions import a_session, a_turn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


USE_EVERYTHING = r"""
import io, os, sys
from pathlib import Path
from streamchat.cli import main as cli
from streamchat.frontend.slash.session_commands import SessionCommands
from streamchat.frontend.watch import Watcher, monitored_sessions, find_monitored
from streamchat.store.database import database_path
from streamchat.store.store import Store
from tests.support.real_engine import running
from tests.support.desk import Desk

database, made, opened = str(database_path()), [], []

def hook(event, arguments):
    if event == "open" and not isinstance(arguments[0], int):
        name = os.path.abspath(os.fsdecode(arguments[0]))
        if name in (database, database + "-wal", database + "-shm", database + "-journal"):
            exclusive = os.O_CREAT | os.O_EXCL
            (made if arguments[2] & exclusive == exclusive else opened).append(name)
            if name in opened:
                import traceback
                traceback.print_stack()

sys.addaudithook(hook)

def run(*argv):
    code = cli.main(list(argv))
    assert code in (0, 1), (argv, code)

with running(store=Path(database)) as engine:
    engine.turn("hello there")
    [opening] = [event for event in engine.events if type(event).__name__ == "SessionOpened"]
    session = opening.session
    desk = Desk()
    for line in ("/sessions", "/sessions hello", "/recall hello", "/resume x", "/export a.md"):
        desk.say(line)
    SessionCommands().complete_id(None, "")
    Watcher(find_monitored(session)).poll()
    assert monitored_sessions()
    for argv in (
        ["sessions"], ["sessions", "list", "--json", "hello"], ["sessions", "show", session], ["sessions", "backups"],
        ["sessions", "rename", session, "new"], ["sessions", "export", session, "--format", "jsonl", "-o", "out.jsonl"],
        ["sessions", "import", "out.jsonl"], ["sessions", "repair"], ["monitor", "--once", "--json"],
        ["monitor", "--list"], ["doctor", "--json"],
    ):
        run(*argv)
    imported = [info.id for info in Store().sessions() if info.id != session][0]
    run("sessions", "delete", imported, "--yes")
    engine.turn("again")
with running(store=Path(database), session=session) as engine:
    engine.turn("after a resume")
assert len(made) == 1, made
assert opened == [], opened
print("used", file=sys.stderr)
"""


@pytest.mark.slow
def test_only_sqlite_opens_the_database(path: Path) -> None:
    """Whoever else opened and closed it would drop the locks of this process: every command, beside a running chat."""
    done = subprocess.run(
        [sys.executable, "-c", USE_EVERYTHING], capture_output=True, text=True, check=False, env=_environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.rstrip().endswith("used")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# --- it goes away -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted there")
@pytest.mark.parametrize("name", ["streamchat.db", "streamchat.db-wal"])
def test_a_database_that_was_deleted_is_not_written_into_silently(path: Path, name: str) -> None:
    with Store(path) as store:
        session = a_session(store)
        store.write(session, turns=[a_turn(1, "one")])
        path.with_name(name).unlink()
        said = (
            "was deleted or replaced while streamchat had it open, so nothing more is saved; quit and start streamchat"
        )
        for use in (
            lambda: store.write(session, turns=[a_turn(2, "two")]),
            lambda: store.load(session),
            lambda: a_session(store),
            store.repair,
            lambda: store.search("one"),
        ):
            with pytest.raises(StoreError, match=said):
                use()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted there")
def test_closing_a_deleted_database_leaves_the_new_one_alone(path: Path) -> None:
    """Its log has the name of the old one's, which closing deletes."""
    old = Store(path)
    a_session(old, "old")
    for file in path.parent.glob("streamchat.db*"):
        file.unlink()
    code = (
        "import os, sys; from pathlib import Path; from streamchat.store.store import Store; "
        "from tests.support.saved_sessions import a_session; "
        f"s = Store(Path({str(path)!r})); a_session(s, 'new'); print('ready', flush=True); "
        "input(); a_session(s, 'newer')"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with Store(path) as new:  # another store of this process sees the new file
        assert [info.title for info in new.sessions()] == ["new"]
        with pytest.raises(StoreError, match="was deleted or replaced"):
            old.sessions()
    old.close()
    other.communicate("\n", timeout=30)
    with Store(path) as new:
        assert sorted(info.title for info in new.sessions()) == ["new", "newer"]
        assert examine(new.path).problems == []


@pytest.mark.parametrize("is_database", [False, True])
def test_a_file_without_tables_is_a_new_database(path: Path, is_database: bool) -> None:
    """A process was killed after it had created the file, or SQLite had written its header, and before any table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    create_private(path)
    if is_database:
        connect(path).close()
    assert examine(path) == HealthReport([])
    with Store(path) as store:
        assert store.sessions() == []
        a_session(store)
    assert examine(path).sessions == 1


def test_a_database_of_another_program_is_no_new_one(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (id)")
    assert examine(path).problems == ["no such table: sessions"]


@pytest.mark.skipif(sys.platform == "win32", reason="modes")
def test_a_missing_file_is_created_private_and_once(path: Path) -> None:
    umask = os.umask(0)
    try:
        with Store(path) as store:
            a_session(store)
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob("streamchat.db*")}
    finally:
        os.umask(umask)
    assert modes == {"streamchat.db": 0o600, "streamchat.db-wal": 0o600, "streamchat.db-shm": 0o600}


# --- one for each process ---------------------------------------------------------------------------------------


def test_all_stores_of_a_process_share_one_database(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    with Store(path) as first:
        link.symlink_to(path.parent, target_is_directory=True)
        with Store(path) as second, Store(link / path.name) as third:
            assert first._open is second._open is third._open
            second.close()
            second.close()  # twice is once
            with pytest.raises(StoreError, match="was closed; open it again"):
                second.sessions()
            a_session(first)
            assert len(third.sessions()) == 1
    assert databases._open == {key: each for key, each in databases._open.items() if each.path != path}
    database = acquire(path)
    assert database.users == 1
    release(database)


def test_threads_of_a_process_write_and_read_at_once(path: Path) -> None:
    """As the engine and the interface do: transactions of one are never mixed with statements of the other."""
    problems: list[BaseException] = []
    with Store(path) as shared:
        sessions = [a_session(shared, f"s{n}") for n in range(4)]

        def write(session: str) -> None:
            try:
                with Store(path) as store:
                    for n in range(1, 26):
                        store.write(session, turns=[a_turn(n, f"{session} {n}", "reply")])
            except BaseException as error:
                problems.append(error)

        def read() -> None:
            try:
                for _ in range(60):
                    with Store(path) as store:
                        for session in sessions:
                            turns = store.load(session).turns
                            assert [turn.number for turn in turns] == list(range(1, len(turns) + 1))
                        store.search("reply")
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=write, args=(session,)) for session in sessions]
        threads += [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        assert [len(shared.load(session).turns) for session in sessions] == [25] * 4
        assert examine(shared.path).problems == []


def test_reading_does_not_wait_for_a_writer_that_waits(path: Path) -> None:
    """Another process has the database locked for writing: the engine waits, and the interface goes on."""
    with Store(path) as store:
        session = a_session(store)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        waiting = threading.Thread(target=lambda: store.rename(session, "late"))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        assert store.find(session).title == "The sea"
        other.execute("ROLLBACK")
        other.close()
        waiting.join()
        assert store.find(session).title == "late"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_write_ahead_log_shrinks_after_a_long_reader(path: Path) -> None:
    with Store(path) as store, closing(connect(path)) as other:
        session = a_session(store)
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM sessions").fetchone()
        log = Path(f"{path}-wal")
        while log.stat().st_size < 2 * LOG_BYTES:  # cannot be checkpointed while the other one reads
            store.change(session, [("title", "x" * 400_000)], {})
        other.execute("ROLLBACK")
        for _ in range(3):
            store.change(session, [("title", "y")], {})
        assert log.stat().st_size <= LOG_BYTES


def test_a_forked_process_opens_it_anew(path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from streamchat.base.errors import StoreError
from streamchat.store.health import examine
from streamchat.store.store import Store
from tests.support.saved_sessions import a_session
path = Path({str(path)!r})
store = Store(path)
a_session(store, "parent")
child = os.fork()
if child == 0:
    code = 1
    try:
        try:
            store.sessions()
        except StoreError as error:
            assert "was opened by another process" in str(error)
            with Store(path) as own:
                a_session(own, "child")
            store.close()
            code = 0
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
assert (path.parent / "streamchat.db-wal").exists()
a_session(store, "after")
assert sorted(info.title for info in store.sessions()) == ["after", "child", "parent"]
assert examine(store.path).problems == []
store.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=_environment())
    assert done.returncode == 0, done.stderr[-2000:]


# --- what the system says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some disk space"),
        (errno.EDQUOT, "your disk quota is used up"),
        (errno.EROFS, "its disk is mounted read-only"),
        (errno.EACCES, "make its folder writable"),
        (errno.EMFILE, "too many files are open"),
        (errno.EIO, "the disk reports an error"),
    ],
)
@pytest.mark.parametrize("where", ["file", "folder"])
def test_the_cause_decides_the_advice(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str, where: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(databases, "create_private" if where == "file" else "UserLock", fail)
    with pytest.raises(StoreError, match=f"{os.strerror(code)}; {advice}"):
        Store(path)


@pytest.mark.parametrize("name", ["SQLITE_CANTOPEN", "SQLITE_IOERR_WRITE", "SQLITE_READONLY_DIRECTORY"])
def test_where_sqlite_does_not_say_why_the_folder_is_tried(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """SQLite reports a full disk as "unable to open database file" when it creates the log."""
    path.parent.mkdir()

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    error = sqlite3.OperationalError("unable to open database file")
    error.sqlite_errorname = name
    with (
        pytest.raises(StoreError, match="unable to open database file; free some disk space"),
        failures.as_store_errors(path),
    ):
        raise error


@pytest.mark.skipif(sys.platform == "win32", reason="size limits")
def test_a_size_limit_that_the_database_has_reached_is_named(path: Path) -> None:
    """A small file can still be written, so the error advised making the folder writable."""
    disk = FullDisk()
    with Store(path) as store:
        session = a_session(store)
        store.change(session, [("title", "x" * 900_000)], {})
        disk.apply({"bytes": 1_000_000})
        try:
            with pytest.raises(StoreError, match="exceeds the size limit; raise it with `ulimit -f`"):
                store.change(session, [("title", "x" * 900_000)], {})
        finally:
            disk.end()
        store.change(session, [("title", "y")], {})


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files")
def test_a_limit_of_open_files_that_leaves_one_is_named(path: Path) -> None:
    """One file can still be opened, so the error advised making the folder writable."""
    import resource

    path.parent.mkdir(parents=True, exist_ok=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = os.open(path.parent, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + 2, limits[1]))
    try:
        found = failures.why_not_writable(path.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(first)
    assert found == errno.EMFILE
    assert failures.why_not_writable(path.parent) is None


def damaged_schema(path: Path, *statements: str) -> str:
    """Save a session, change the schema behind SQLite's back, and return the session's id."""
    with Store(path) as store:
        session = a_session(store)
        store.write(session, turns=[a_turn(1, "hi")])
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA writable_schema = ON")
    for statement in statements:
        connection.execute(statement)
    connection.close()
    return session


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE sqlite_schema SET sql = replace(sql, 'reply_first', 'reply_farst') WHERE name = 'turns'",
        "UPDATE sqlite_schema SET sql = replace(sql, 'content', 'cantent') WHERE name = 'turns'",
    ],
)
def test_tables_with_other_columns_are_told(path: Path, statement: str) -> None:
    session = damaged_schema(path, statement)
    told = r"its tables are not those of streamchat \(.+\); the file is damaged"
    with Store(path) as store, pytest.raises(StoreError, match=told):
        store.load(session)


def test_a_schema_that_is_not_utf8_is_told(path: Path) -> None:
    broken = "CAST(replace(CAST(sql AS TEXT), 'DEFAULT', CAST(x'4445ff4155' AS TEXT)) AS TEXT)"
    damaged_schema(path, f"UPDATE sqlite_schema SET sql = {broken} WHERE name = 'sessions'")
    for use in (Store, examine):
        with pytest.raises(StoreError, match=r"malformed database schema .*; the file is damaged"):
            use(path)
