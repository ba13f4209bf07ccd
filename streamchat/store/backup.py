"""Backups of a database, next to it in `backups/`: one per day, and one before each migration.

They are made with SQLite's online backup from one state of the database, while other processes read and write it. A
backup gets its final name only after it was checked and is on the disk.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG

from filelock import FileLock, Timeout

from streamchat.base import paths
from streamchat.base.atomic_files import advice_on, atomic_write
from streamchat.base.errors import StoreError, reason_of
from streamchat.store.clock import latest_time
from streamchat.store.connection import connect, create_private
from streamchat.store.failures import SQLITE_ERRORS, advise_on_damage, is_damage, text_of, why_not_writable
from streamchat.store.schema import MIGRATIONS
from streamchat.store.users import lock_folder

KEEP = 7
"""Number of daily backups to keep."""
KEEP_BEFORE_MIGRATION = 2
PAGES = 512
"""Pages copied between two checks of whether to stop."""


class BackupStopped(Exception):
    """The backup was abandoned because the program exits."""


@dataclass(frozen=True)
class Backup:
    """A backup file."""

    path: Path
    made: float
    """Time of the state that it contains, in seconds since 1970."""
    nbytes: int

    @property
    def name(self) -> str:
        """The name that `streamchat sessions restore-backup` accepts."""
        return self.path.name

    @property
    def is_daily(self) -> bool:
        """Whether it is a daily backup, of which `KEEP` are kept."""
        return re.fullmatch(r".+-\d{4}-\d\d-\d\d\.db", self.name) is not None

    @property
    def is_ahead(self) -> bool:
        """Whether its time is in the future, so that its age is unknown."""
        return self.made > latest_time()


def backup_folder(database: Path) -> Path:
    """Return the folder of a database's backups."""
    return database.parent / "backups"


def backups(database: Path) -> list[Backup]:
    """Return the backups of a database, newest first; those made while the clock was ahead come last."""
    stem, found = re.escape(database.stem), []
    with suppress(OSError):
        for path in backup_folder(database).iterdir():
            if re.fullmatch(rf"{stem}-(\d{{4}}-\d\d-\d\d|schema-\d+)\.db", path.name):
                about = path.stat()
                if S_ISREG(about.st_mode):  # opening a FIFO would block
                    found.append(Backup(path, about.st_mtime, about.st_size))
    return sorted(found, key=lambda each: (not each.is_ahead, each.made), reverse=True)


def date_of_today() -> str:
    """Return today's date as the names of daily backups contain it: "2026-03-14", in local time."""
    return time.strftime("%Y-%m-%d")


def is_due(database: Path, today: str | None = None) -> bool:
    """Return whether today has no backup and the database changed since the newest one."""
    daily = [backup for backup in backups(database) if backup.is_daily and not backup.is_ahead]
    today = today or date_of_today()
    if any(backup.name == f"{database.stem}-{today}.db" for backup in daily):
        return False
    return not daily or _last_change(database) > daily[0].made


def _last_change(database: Path) -> float:
    changes = [0.0]
    for path in (database, database.with_name(f"{database.name}-wal")):
        with suppress(OSError):
            about = path.stat()
            changes.append(about.st_mtime if about.st_size else 0.0)
    return max(changes)


def _has_sessions(database: Path) -> bool:
    with closing(connect(database)) as connection:
        return connection.execute("SELECT 1 FROM sessions LIMIT 1").fetchone() is not None


def back_up_daily(database: Path, is_stopped: Callable[[], bool] = lambda: False) -> Path | None:
    """Make today's backup if it is due, and delete the oldest ones; return None if none was made.

    A database without sessions is not backed up: that would use up the day's backup, and would be the newest one to
    restore.

    Raises:
        StoreError: The backup failed, or the database is damaged.
    """
    today = date_of_today()
    if not is_due(database, today):
        return None
    with _backup_lock(database) as alone:
        if not alone or not is_due(database, today):
            return None
        target = backup_folder(database) / f"{database.stem}-{today}.db"
        try:
            if not _has_sessions(database):
                return None
            _make(database, target, is_stopped)
        except BackupStopped:
            return None
        except (*SQLITE_ERRORS, OSError) as error:
            raise StoreError(f"today's backup of {database} failed: {_reason(database, error)}") from error
        for old in [backup for backup in backups(database) if backup.is_daily][KEEP:]:
            with suppress(OSError):
                old.path.unlink()
        return target


def back_up_before_migration(database: Path, version: int) -> None:
    """Back up a database that is about to be migrated from `version`. A failure does not prevent the migration."""
    target = backup_folder(database) / f"{database.stem}-schema-{version}.db"
    with suppress(BackupStopped, *SQLITE_ERRORS, OSError), _backup_lock(database, wait_s=30) as alone:
        if alone:
            _make(database, target, lambda: False, version)
            others = [backup for backup in backups(database) if not backup.is_daily]
            for old in others[KEEP_BEFORE_MIGRATION:]:
                old.path.unlink()


@contextmanager
def _backup_lock(database: Path, wait_s: float = 0) -> Iterator[bool]:
    """Yield whether this process may change backups alone; delete unfinished files of a killed process."""
    folder = paths.private_dir(lock_folder(database))
    lock = FileLock(folder / f"{database.name}.backup.lock", timeout=wait_s, is_singleton=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        for left in backup_folder(database).glob(".*.part*"):
            left.unlink(missing_ok=True)
        yield True
    finally:
        lock.release()


@contextmanager
def backups_locked(database: Path) -> Iterator[None]:
    """Prevent all processes from making a backup inside this block.

    Raises:
        StoreError: Another process is still making a backup.
    """
    with _backup_lock(database, wait_s=60) as alone:
        if not alone:
            raise StoreError(f"another streamchat process is making a backup of {database}; try again in a moment")
        yield


def _make(database: Path, target: Path, is_stopped: Callable[[], bool], version: int | None = None) -> None:
    """Copy one state of the database to `target`, completely or not at all.

    Args:
        database: The file.
        target: Replaced if it exists.
        is_stopped: Called from time to time.
        version: Version of its tables; any by default.

    Raises:
        BackupStopped: `is_stopped` returned true, or another process has changed the version.
    """

    def check_stopped(*_: int) -> None:
        if is_stopped():
            raise BackupStopped

    with atomic_write(target, durable=True) as partial:
        with closing(connect(database)) as source:
            moment = time.time()
            source.execute("BEGIN")
            found = source.execute("PRAGMA user_version").fetchone()[0]  # fixes the state, whatever is written later
            if version not in (None, found):
                raise BackupStopped
            create_private(partial)
            with closing(sqlite3.connect(partial, isolation_level=None)) as copy:
                copy.execute("PRAGMA synchronous = OFF")  # flushed once, below
                source.backup(copy, pages=PAGES, progress=check_stopped)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log
                problem = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(f"{problem}; run `streamchat doctor` for details")
        os.utime(partial, (moment, moment))


def _reason(database: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{reason_of(error)}; {advice_on(error.errno)}"
    if is_damage(error) or type(error) is sqlite3.DatabaseError:
        return f"the database is damaged ({text_of(error)})"
    return f"{error}; {advice_on(why_not_writable(database.parent))}"


# --- checking ---------------------------------------------------------------------------------------------------


def open_backup(path: Path) -> sqlite3.Connection:
    """Open a connection that reads a backup and creates no other file."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)


@lru_cache(maxsize=64)
def problem_of(backup: Backup) -> str:
    """Return why a backup cannot be used; '' if it is intact. Reads the whole file once."""
    try:
        with closing(open_backup(backup.path)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            found: str = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            connection.execute("SELECT count(*) FROM sessions").fetchone()
    except SQLITE_ERRORS as error:
        return text_of(error)
    if version > len(MIGRATIONS):
        return f"it was written by a newer streamchat (version {version} of its tables)"
    if version < 0:
        return f"its tables have version {version}"
    return "" if found == "ok" else found


def newest_sound_backup(database: Path) -> Backup | None:
    """Return the newest intact backup."""
    return next((backup for backup in backups(database) if not problem_of(backup)), None)


def _advice(database: Path) -> str:
    """Return what to do if the user's database is damaged; '' without a backup."""
    own = os.path.realpath(database) == os.path.realpath(paths.data_dir() / "streamchat.db")
    if not own or (backup := newest_sound_backup(database)) is None:
        return ""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(backup.made))
    return (
        f"the file is damaged; `streamchat sessions restore-backup {backup.name}` moves it aside and restores the "
        f"backup of {when}"
    )


advise_on_damage(_advice)
