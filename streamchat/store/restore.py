"""Replaces a database by a backup, and deletes a session from backups."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from streamchat.base import paths
from streamchat.base.atomic_files import atomic_write
from streamchat.base.errors import StoreError, reason_of
from streamchat.store.backup import (
    Backup,
    backups,
    backups_locked,
    newest_sound_backup,
    open_backup,
    problem_of,
)
from streamchat.store.connection import create_private, transaction
from streamchat.store.failures import SQLITE_ERRORS, as_store_errors
from streamchat.store.health import problems_of, repair
from streamchat.store.scrub import rewrite
from streamchat.store.users import UserLock

LOG_FILES = ("-wal", "-shm")
Move = tuple[Path, Path]
"""The names of a file before and after it was renamed."""


def restore(database: Path, backup: Backup) -> Path | None:
    """Replace `database` by `backup`.

    Returns:
        The path that the old database, with its log, was moved to; None if there was none.

    Raises:
        StoreError: Another process uses the database, or the backup is damaged. Nothing has changed then.
    """
    if problem := problem_of(backup):
        raise StoreError(f"{backup.path} cannot be restored: {problem}; `streamchat sessions backups` lists the others")
    with as_store_errors(database):
        paths.private_dir(database.parent)
        alone = UserLock(database, alone=True)
        moved: list[Move] = []
        try:
            with atomic_write(database, durable=True) as partial:
                _copy(backup.path, partial)
                with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
                    _ensure_sound(connection, backup)
                paths.fsync(partial)  # slow; from the next line on the database is without its log until it is replaced
                return _set_aside(database, moved)
        except BaseException:
            for before, after in reversed(moved):
                _move_back(after, before)
            raise
        finally:
            alone.release()


def _copy(source: Path, target: Path) -> None:
    create_private(target)
    shutil.copyfile(source, target)


def _ensure_sound(connection: sqlite3.Connection, backup: Backup) -> None:
    if not problems_of(connection):
        return
    if problems := repair(connection):
        raise StoreError(f"{backup.path} cannot be restored: {problems[0]}; choose another backup")


def _set_aside(database: Path, moved: list[Move]) -> Path | None:
    """Rename a log, and give its database a second name, so that there is always one that has the first.

    The log goes first, as a database must never meet another database's log.

    Args:
        database: Need not exist.
        moved: The renamed files are appended to it.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = database.with_name(f"{database.name}.damaged-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = database.with_name(f"{database.name}.damaged-{stamp}-{number}")
    for end in (*LOG_FILES, ""):
        before, after = Path(f"{database}{end}"), Path(f"{aside}{end}")
        if before.exists():
            if end:
                os.rename(before, after)
            else:
                _link_or_rename(before, after)
            moved.append((before, after))
        if end == LOG_FILES[-1]:
            paths.fsync(database.parent)
    return aside if aside.exists() else None


def _link_or_rename(before: Path, after: Path) -> None:
    try:
        os.link(before, after)
    except OSError:  # a file system without hard links
        os.rename(before, after)


def _move_back(after: Path, before: Path) -> None:
    if before.exists() and os.path.samefile(before, after):
        after.unlink()
    else:
        os.replace(after, before)


def set_aside(database: Path) -> list[Path]:
    """Return the databases that `restore` moved aside."""
    aside = database.parent.glob(f"{database.name}.damaged-*")
    return sorted(path for path in aside if not path.name.endswith(LOG_FILES))


def empty_database_notice(database: Path) -> str:
    """Return a notice if the database has no sessions and its newest intact backup has some; '' otherwise."""
    if (backup := newest_sound_backup(database)) is None:
        return ""
    try:
        count = session_count(backup)
    except StoreError:
        return ""
    if not count:
        return ""
    return (
        f"{database} has no sessions, but its newest backup has {count:,}; "
        f"`streamchat sessions restore-backup {backup.name}` restores it"
    )


def session_count(backup: Backup) -> int:
    """Return the number of sessions in an intact backup.

    Raises:
        StoreError: It cannot be read.
    """
    with as_store_errors(backup.path), closing(open_backup(backup.path)) as connection:
        return int(connection.execute("SELECT count(*) FROM sessions").fetchone()[0])


# --- deleting ---------------------------------------------------------------------------------------------------


def backups_with(database: Path, session: str) -> list[Backup]:
    """Return the backups that contain a session, and those that cannot be read."""
    return [backup for backup in backups(database) if _has(backup, session)]


def _has(backup: Backup, session: str) -> bool:
    try:
        with closing(open_backup(backup.path)) as connection:
            found = connection.execute("SELECT 1 FROM sessions WHERE id = ?", (session,)).fetchone()
            return found is not None
    except SQLITE_ERRORS:
        return True


def delete_from_backups(database: Path, session: str) -> tuple[int, list[str]]:
    """Delete a session and its text from all backups.

    Returns:
        The number of changed backups, and a sentence for each backup that cannot be changed.

    Raises:
        StoreError: Another process is still making a backup.
    """
    changed, problems = 0, list[str]()
    with as_store_errors(database), backups_locked(database):
        for backup in backups_with(database, session):
            try:
                _delete(backup, session)
            except (*SQLITE_ERRORS, OSError) as error:
                problems.append(f"the backup {backup.path} may still contain it ({reason_of(error)}); delete that file")
            else:
                changed += 1
    return changed, problems


def _delete(backup: Backup, session: str) -> None:
    with atomic_write(backup.path, durable=True) as partial:
        _copy(backup.path, partial)
        with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")
            with transaction(connection):
                connection.execute("DELETE FROM sessions WHERE id = ?", (session,))
            rewrite(connection)
        os.utime(partial, (backup.made, backup.made))
