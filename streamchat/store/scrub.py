"""Removes the text of deleted sessions from the files, not only from the tables.

A full-text index keeps deleted words until it is merged, and a page that was split or freed may keep text. So the
indexes are rebuilt, `VACUUM` rewrites every page, and the write-ahead log is truncated. That takes as long as copying
the database. FTS5's own `secure-delete` would be faster, but SQLite before 3.42 cannot read an index that has used it.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from streamchat.base import paths
from streamchat.base.atomic_files import write_text
from streamchat.store.connection import transaction
from streamchat.store.failures import is_damage
from streamchat.store.health import full_text_indexes
from streamchat.store.users import lock_folder


def pending_mark(path: Path) -> Path:
    """Return the path of a file that exists while text of deleted sessions may remain in the database files."""
    return lock_folder(path) / f"{path.name}.scrub"


def mark_pending(path: Path) -> None:
    """Record that text must be removed. Call this before it is deleted from the tables."""
    write_text(pending_mark(path), "", durable=True)


def scrub(connection: sqlite3.Connection, path: Path) -> bool:
    """Remove deleted text from the files of the database; return whether that succeeded.

    Args:
        connection: Outside of a transaction, and the only connection of this process that is in use.
        path: The database.
    """
    try:
        rewrite(connection)
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if not busy:
            _flush_log(connection)
    except sqlite3.OperationalError as error:
        if is_damage(error):
            raise
        return False
    if not busy:
        with suppress(OSError):
            pending_mark(path).unlink(missing_ok=True)
    return not busy


def _flush_log(connection: sqlite3.Connection) -> None:
    """Flush the empty log by a commit that changes nothing.

    SQLite does not flush its new size: after a power failure it could have the deleted text again. Only SQLite may open
    it.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.execute(f"PRAGMA user_version = {version}")


def remove_orphans(connection: sqlite3.Connection, folder: Path) -> None:
    """Delete the files of sessions that are not in the database from the folder of the snapshots, for good.

    Args:
        connection: Outside of a transaction.
        folder: Its files, also those that a killed process left unfinished, begin with the id of a session. It may be
            missing.

    Raises:
        OSError: A file cannot be deleted.
    """
    try:
        names = os.listdir(folder)  # first: a session that begins meanwhile is no orphan
    except FileNotFoundError:
        return
    known = {row[0] for row in connection.execute("SELECT id FROM sessions").fetchall()}
    orphans = [name for name in names if name.lstrip(".").partition(".")[0] not in known]
    for name in orphans:
        (folder / name).unlink(missing_ok=True)
    if orphans:
        paths.fsync(folder)


def rewrite(connection: sqlite3.Connection) -> None:
    """Rebuild the full-text indexes and rewrite every page."""
    with transaction(connection):
        for index in full_text_indexes(connection):
            connection.execute(f"INSERT INTO {index} ({index}) VALUES ('rebuild')")
    connection.execute("VACUUM")
