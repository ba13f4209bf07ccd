"""Connections to a database file that only the user can read, with a write-ahead log and transactions.

Except in `create_private`, only SQLite opens and closes the file: see `streamchat.store.database`.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from streamchat.store.failures import is_busy

BUSY_TIMEOUT_S = 10.0
"""How long a write waits while another program keeps the database locked."""
BLOCKED_TIMEOUT_S = 0.05
"""How long the next writes wait, until one succeeds: another program that is suspended must not stop a chat."""
LOG_BYTES = 4_000_000
"""Size to which the write-ahead log shrinks once it is checkpointed. SQLite checkpoints it at 1,000 pages, about this
size, but while another program reads, it grows."""


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection in autocommit mode to the existing database at `path`.

    A committed write survives `kill -9` and a power cut (WAL, `synchronous = FULL`). Readers always see a state between
    two commits.
    """
    uri = f"{path.absolute().as_uri()}?mode=rw"  # SQLite would create a file that others may read
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        # one text that is not valid UTF-8 must not make all others unreadable
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        _use_wal(connection)
        connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def create_private(path: Path) -> None:
    """Create an empty file that only the user can read, unless the path exists.

    SQLite would make it readable by others. The -wal and -shm files inherit the mode.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. If another program is doing the same, retry: SQLite itself does not wait here."""
    end = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)


def set_busy_timeout(connection: sqlite3.Connection, seconds: float) -> None:
    """Change how long the connection waits for locks."""
    connection.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")


def read_schema(connection: sqlite3.Connection) -> None:
    """Load the current schema, and fix the state of the database that this transaction sees.

    If a statement on a full-text index is the first to meet a new schema, for example after another process ran
    `VACUUM`, it fails with "no such table" (SQLite 3.40): the index reads its own tables while the statement is
    prepared.
    """
    connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block does, or roll all of it back."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        read_schema(connection)
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself ends it on some errors, such as a full disk
            connection.execute("ROLLBACK")
        raise
