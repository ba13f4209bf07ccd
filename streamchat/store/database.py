"""The databases that this process has open: one `Database` per file, which only the user can read.

Only SQLite opens and closes the file. On POSIX, closing any descriptor of a file drops all locks that the process has
on it, including SQLite's; the next program that closes the database would then delete the log that this one uses. The
only exception is creation, which is exclusive and happens while this process is not opening a connection.

A `Database` has two connections, one for writing and one for reading, each with a lock. With one shared connection, the
front end would wait whenever the engine waits for another process. A connection per thread would stay open after its
thread ends.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path

from streamchat.base import paths
from streamchat.base.atomic_files import remove_partial
from streamchat.base.errors import StoreError
from streamchat.store.backup import back_up_before_migration
from streamchat.store.connection import (
    BLOCKED_TIMEOUT_S,
    BUSY_TIMEOUT_S,
    connect,
    create_private,
    read_schema,
    set_busy_timeout,
    transaction,
)
from streamchat.store.failures import as_store_errors, is_busy
from streamchat.store.schema import migrate
from streamchat.store.users import UserLock


def database_path() -> Path:
    """Return the path of the user's database."""
    return paths.data_dir() / "streamchat.db"


def database_identity(path: Path) -> str:
    """Return a text that identifies a database, also across machines; '' if there is no file.

    Two programs on one machine that get the same text use the same file.
    """
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return blake2b(f"{socket.gethostname()}:{found.st_dev}:{found.st_ino}".encode(), digest_size=16).hexdigest()


class Files:
    """The files that a connection has open, by device and inode. A check takes about 5 us."""

    def __init__(self, path: Path) -> None:
        self._names = (str(path), f"{path}-wal")
        self._known: dict[str, tuple[int, int]] = {}

    def missing(self) -> bool:
        """Return whether a file was deleted or replaced since the first check."""
        for name in self._names:
            try:
                found = os.stat(name)
            except FileNotFoundError:
                if name in self._known:
                    return True
                continue
            identity = (found.st_dev, found.st_ino)
            if self._known.setdefault(name, identity) != identity:
                return True
        return False


class Database:
    """One database file, shared by all threads of this process. Get it from `acquire`; return it with `release`.

    Args:
        path: The file.

    Raises:
        StoreError: The file cannot be opened, is damaged, or was written by a newer program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.users = 0
        self._process = os.getpid()
        self._writing, self._reading = threading.RLock(), threading.RLock()
        self._reader: sqlite3.Connection | None = None
        self._is_blocked = False
        """Whether the latest write failed because another program kept the database locked."""
        with as_store_errors(path), ExitStack() as undo:
            paths.private_dir(path.parent)
            self._in_use = UserLock(path)
            undo.callback(self._in_use.release)
            if self._in_use.is_held:  # so no program is restoring a backup
                remove_partial(path)
            create_private(path)
            self.writer = connect(path)
            undo.callback(self.writer.close)
            migrate(self.writer, path, back_up_before_migration)
            self._files = Files(path)  # after the first statement, which locks them for this process
            self._files.missing()
            undo.pop_all()

    @property
    def is_stale(self) -> bool:
        """Whether the file was deleted or replaced, or was opened by the process that this one was forked from."""
        return self._process != os.getpid() or self._files.missing()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Yield the read connection; each block sees one state of the database.

        Raises:
            StoreError: The file fails, or was replaced since it was opened.
        """
        with self._reading, as_store_errors(self.path):
            self.check()
            if self._reader is None:
                with _registry:  # no other connection is opened at the same time
                    self._reader = connect(self.path)
            self._reader.execute("BEGIN")
            try:
                read_schema(self._reader)
                yield self._reader
            finally:
                if self._reader.in_transaction:
                    self._reader.execute("ROLLBACK")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Yield the write connection, in a transaction that is on the disk when the block ends.

        Raises:
            StoreError: The file fails, is locked by another program, or was replaced since it was opened.
        """
        with self._writing, as_store_errors(self.path):
            self.check()
            try:
                with transaction(self.writer):
                    yield self.writer
            except sqlite3.OperationalError as error:
                if is_busy(error):
                    self._set_blocked(True)
                raise
            self._set_blocked(False)
            self.check()

    def be_patient(self) -> None:
        """Let the next write wait the full time for another program, even if the latest one has done so."""
        with self._writing:
            self._set_blocked(False)

    def _set_blocked(self, is_blocked: bool) -> None:
        if is_blocked != self._is_blocked:
            self._is_blocked = is_blocked
            set_busy_timeout(self.writer, BLOCKED_TIMEOUT_S if is_blocked else BUSY_TIMEOUT_S)

    @contextmanager
    def exclusive(self) -> Iterator[sqlite3.Connection]:
        """Yield the write connection, outside of a transaction, while no other thread uses the database."""
        with self._writing, self._reading, as_store_errors(self.path):
            self.check()
            read_schema(self.writer)
            yield self.writer

    def check(self) -> None:
        """Check that this process may use the file.

        Raises:
            StoreError: It was opened by another process, or was deleted or replaced.
        """
        if self._process != os.getpid():
            raise StoreError(f"{self.path} was opened by another process; open it again")
        if self._files.missing():
            raise StoreError(
                f"{self.path} was deleted or replaced while streamchat had it open, so nothing more is saved; "
                "quit and start streamchat again"
            )

    def close(self) -> None:
        """Close both connections."""
        if self._process != os.getpid():
            return  # closing here would drop the locks of the other process
        with self._writing, self._reading:
            if self._reader is not None:
                self._reader.close()
            self.writer.close()
        self._in_use.release()


# --- one database for each file ---------------------------------------------------------------------------------

_registry = threading.RLock()
_open: dict[str, Database] = {}
_inherited: list[Database] = []
"""Databases of the parent process, after a fork: neither used nor closed here."""


def acquire(path: Path) -> Database:
    """Return the database at `path`; open it if it is not open in this process.

    Raises:
        StoreError: The file cannot be opened.
    """
    with _registry:
        key = os.path.realpath(path)
        database = _open.get(key)
        if database is None or database.is_stale:
            database = _open[key] = Database(path)
        database.users += 1
        return database


def release(database: Database) -> None:
    """End one use of the database; the last `release` closes it."""
    with _registry:
        database.users -= 1
        if database.users:
            return
        for key in [key for key, each in _open.items() if each is database]:
            del _open[key]
        database.close()


def _drop_inherited() -> None:
    global _registry
    _registry = threading.RLock()
    _inherited.extend(_open.values())
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited)
