"""Removes the words of deleted conversations from the files, not only from the tables.

A full-text index keeps deleted words until it is merged, and a page that was split or freed may keep text. So the
indexes are made again, `VACUUM` writes every page anew, and the write-ahead log is emptied. That takes as long as
copying the database. FTS5's own `secure-delete` would be quicker, but SQLite before 3.42 cannot read an index that has
used it.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path

from streamchat.base import paths
from streamchat.store.connection import transaction
from streamchat.store.failures import is_busy, is_full
from streamchat.store.health import full_text_indexes
from streamchat.store.users import lock_folder


def pending_mark(path: Path) -> Path:
    """A file that is there while words of deleted conversations may be in the files of the database `path`."""
    return lock_folder(path) / f"{path.name}.scrub"


def mark_pending(path: Path) -> None:
    """Note that there are words to remove. Call this before they are deleted from the tables."""
    mark = pending_mark(path)
    paths.private_dir(mark.parent)
    paths.write_private(mark, "")


def scrub(connection: sqlite3.Connection, path: Path) -> bool:
    """Remove what was deleted from the files of the database; return whether that succeeded.

    Args:
        connection: Outside of a transaction, and the only one of this process that is in use.
        path: The database.
    """
    try:
        rewrite(connection)
    except sqlite3.OperationalError as error:
        if is_busy(error) or is_full(error):
            return False
        raise
    busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if not busy:
        with suppress(OSError):
            pending_mark(path).unlink(missing_ok=True)
    return not busy


def rewrite(connection: sqlite3.Connection) -> None:
    """Rebuild the full-text indexes and rewrite every page."""
    with transaction(connection):
        for index in full_text_indexes(connection):
            connection.execute(f"INSERT INTO {index} ({index}) VALUES ('rebuild')")
    connection.execute("VACUUM")
