"""Opening the database: private, write-ahead log, every failure one sentence."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamchat import paths
from streamchat.errors import StoreError
from streamchat.store.schema import migrate

BUSY_TIMEOUT_S = 10.0


def database_path() -> Path:
    """The database of this user."""
    return paths.data_dir() / "streamchat.db"


def connect(path: Path) -> sqlite3.Connection:
    """Open, create or migrate the database at `path`.

    A write that was committed survives `kill -9` and a power cut (WAL, `synchronous = FULL`); what readers see is
    always a state between two commits.

    Raises:
        StoreError: It cannot be opened, is damaged, or was written by a newer program.
    """
    with sentences(path):
        paths.private_dir(path.parent)
        # created by us: SQLite would make it readable by others, and its -wal and -shm files inherit from it
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            migrate(connection, str(path))
        except BaseException:
            connection.close()
            raise
        return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. SQLite does not wait by itself for another program that does so at this moment."""
    end = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = (getattr(error, "sqlite_errorname", "") or "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
            if not busy or time.monotonic() > end:
                raise
            time.sleep(0.02)


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Failures of SQLite and of the file system as `StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be used: {error}; {_advice(error)}") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be used: {error.strerror or error}; {_FOLDER}") from error


_FOLDER = "make its folder writable, or choose another place with STREAMCHAT_HOME"


def _advice(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name == "SQLITE_FULL":
        return "make room on the disk"
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return "the file is damaged; move it away (it is not touched) and a new one is begun"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "another program keeps it locked; close that"
    return _FOLDER


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # SQLite ends it by itself on some errors, such as a full disk
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
