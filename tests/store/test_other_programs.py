"""Other programs keep the database locked, delete what is about to be used, or were killed while they replaced it."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import MissingSessionError, StoreError
from streamchat.store import connection, database
from streamchat.store import store as stores
from streamchat.store.lock import SessionLock
from streamchat.store.scrub import remove_orphans
from streamchat.store.store import Store
from streamchat.store.users import UserLock
from tests.support.saved_sessions import a_session

PATIENCE_S = 0.4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "streamchat.db"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program has begun to write, and does not go on."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def refused_after(store: Store, session: str) -> float:
    """The seconds until a write is refused."""
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"another program keeps it locked; close that program$"):
        store.rename(session, "late")
    return time.monotonic() - started


def test_a_locked_database_is_waited_for_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat writes several times a second: it would stand still if each of these writes waited."""
    monkeypatch.setattr(connection, "BUSY_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", PATIENCE_S)
    with Store(path) as store:
        session = a_session(store)
        with locked(path):
            assert refused_after(store, session) >= PATIENCE_S * 0.9
            assert min(refused_after(store, session) for _ in range(3)) < PATIENCE_S / 2
            store.be_patient()
            assert refused_after(store, session) >= PATIENCE_S * 0.9
        store.rename(session, "now")
        with locked(path):
            assert refused_after(store, session) >= PATIENCE_S * 0.9
        assert store.find(session).title == "now"


@pytest.mark.parametrize("is_deleted", [True, False], ids=["deleted", "changed"])
def test_a_session_that_changes_before_it_is_locked(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_deleted: bool
) -> None:
    with Store(path) as store:
        session = a_session(store)

        def late(*arguments: Any) -> SessionLock:
            if is_deleted:
                store.delete(session)
            else:
                store.rename(session, "changed")
            return SessionLock(*arguments)

        monkeypatch.setattr(stores, "SessionLock", late)
        if is_deleted:
            with pytest.raises(MissingSessionError, match=f"no saved session has the id '{session}'"):
                store.lock_session(session)
            SessionLock(store.lock_folder, session).release()  # nothing keeps it locked
        else:
            info, lock = store.lock_session(session)
            assert info.title == "changed"
            lock.release()


def test_a_deleted_session_is_not_renamed(path: Path) -> None:
    with Store(path) as store:
        session = a_session(store)
        store.delete(session)
        with pytest.raises(MissingSessionError, match=f"no saved session has the id '{session}'"):
            store.rename(session, "new")


def test_the_cache_of_a_session_that_begins_during_a_deletion_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(path) as store:
        folder = store.snapshot_path("").parent
        folder.mkdir()
        listed = os.listdir
        begun: list[Path] = []

        def begin_and_list(where: Path) -> list[str]:
            begun.append(store.snapshot_path(a_session(store)))
            begun[0].touch()
            return listed(where)

        monkeypatch.setattr(os, "listdir", begin_and_list)
        with closing(connection.connect(path)) as deleting:
            remove_orphans(deleting, folder)
        assert begun[0].exists()


def test_what_a_killed_restoration_left_is_removed_at_the_next_start(path: Path) -> None:
    """It has the texts of all sessions of the backup, also of those that are deleted later."""
    path.parent.mkdir()
    left = [path.parent / f".{path.name}.0123abcd.part{end}" for end in ("", "-journal")]
    others = [path.parent / name for name in (".other.db.0123abcd.part", f".{path.name}.mine", "a.part")]
    for file in (*left, *others):
        file.touch()
    alone = UserLock(path, alone=True)
    with pytest.raises(StoreError, match="being restored"):
        Store(path)
    assert all(file.exists() for file in left)
    alone.release()
    Store(path).close()
    assert [file.exists() for file in (*left, *others)] == [False] * 2 + [True] * 3
