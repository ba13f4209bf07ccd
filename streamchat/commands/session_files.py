"""`streamchat sessions delete`, `backups` and `restore-backup`: commands that change the files of saved sessions."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from streamchat.base.errors import ConfigError, ExitCode, SessionError, StoreError
from streamchat.base.formatting import human_bytes, human_when, plural
from streamchat.base.sanitize import one_line, printable
from streamchat.store.backup import KEEP, Backup, backup_folder, backups, problem_of
from streamchat.store.database import database_path
from streamchat.store.health import HealthReport, examine
from streamchat.store.lock import SessionLock
from streamchat.store.records import SessionInfo
from streamchat.store.restore import backups_with, delete_from_backups, restore, session_count, set_aside
from streamchat.store.store import Store


def print_line(text: str) -> None:
    """Print one line on stdout."""
    sys.stdout.write(printable(text) + "\n")


def warn(text: str) -> None:
    """Print one line on stderr."""
    print(f"streamchat: {one_line(text)}", file=sys.stderr)


# --- delete -----------------------------------------------------------------------------------------------------


def delete(store: Store, name: str, *, yes: bool, keep_backups: bool) -> int:
    """Delete a session from the database and its backups; return the exit code.

    Raises:
        SessionError: It does not exist, or it is open.
        ConfigError: stdin is not a terminal, and `yes` was not given.
        StoreError: A file cannot be changed.
    """
    try:
        info = store.find(name)
    except SessionError:
        if keep_backups or not _is_in_backups_only(store, name):
            raise
        if not _may_delete(name, f"{name}, which exists only in backups", yes):
            return _nothing_deleted()
        return _delete_left_over(store, name)
    try:
        lock = SessionLock(store.lock_folder, info.id, info.opened_by)  # held until it is deleted
    except SessionError:
        raise SessionError(
            f"the session {info.id} is open in another streamchat process; close it there first"
        ) from None
    try:
        turns = plural(info.turns, "turn")
        if not _may_delete(info.id, f"“{one_line(info.title)}” ({turns})", yes):
            return _nothing_deleted()
        return _delete(store, info, keep_backups)
    finally:
        lock.release()


def _may_delete(session: str, what: str, yes: bool) -> bool:
    return yes or _is_agreed(f"Delete {what} permanently?", f"deleting {session} cannot be undone; give --yes")


def _is_agreed(question: str, refusal: str) -> bool:
    """Ask the user; raise ConfigError with `refusal` if stdin is not a terminal."""
    if not sys.stdin.isatty():
        raise ConfigError(refusal)
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _nothing_deleted() -> int:
    print_line("Nothing was deleted.")
    return ExitCode.FAILURE


def _delete(store: Store, info: SessionInfo, keep_backups: bool) -> int:
    changed, problems = 0, list[str]()
    if keep_backups:
        kept = backups_with(store.path, info.id)
    else:  # the backups first, so that an interrupted deletion can be repeated
        kept = []
        changed, problems = delete_from_backups(store.path, info.id)
    gone = store.delete(info.id)
    also = f", also from {plural(changed, 'backup')}" if changed else ""
    print_line(f"{info.id} was deleted{also}.")
    if kept:
        print_line(_until(kept))
    if not gone:
        print_line("Its text is still in the file: another program is using it, or the disk is full.")
        print_line("The next chat removes it.")
    return _end(store, problems)


def _is_in_backups_only(store: Store, name: str) -> bool:
    return any(not problem_of(backup) for backup in backups_with(store.path, name))


def _delete_left_over(store: Store, session: str) -> int:
    changed, problems = delete_from_backups(store.path, session)
    print_line(f"{session} was deleted from {plural(changed, 'backup')}.")
    return _end(store, problems)


def _until(kept: Sequence[Backup]) -> str:
    """Describe when the backups that still contain a session will be replaced."""
    until = f"daily backups are replaced over the next {KEEP} days with a chat"
    if any(not backup.is_daily for backup in kept):
        until = f"some of them remain until you delete them from {kept[0].path.parent}"
    return f"{plural(len(kept), 'backup still contains', 'backups still contain')} it: {until}."


def _end(store: Store, problems: Sequence[str]) -> int:
    for problem in problems:
        warn(problem)
    for aside in set_aside(store.path):
        print_line(f"{aside}, a database that restore-backup moved aside, may still contain it; delete it yourself.")
    return ExitCode.STORE if problems else ExitCode.OK


# --- repairing and backups --------------------------------------------------------------------------------------


def repair(store: Store) -> int:
    """Rebuild the indexes of the database; return the exit code.

    Raises:
        StoreError: More than the indexes is damaged.
    """
    if problems := store.repair():
        raise StoreError(
            f"the indexes of {store.path} were rebuilt, but it is still damaged ({problems[0]}); "
            "`streamchat sessions restore-backup` moves it aside and restores the newest intact backup"
        )
    print_line("The indexes were rebuilt; no problems remain.")
    return ExitCode.OK


def list_backups() -> int:
    """Print all backups, newest first; return the exit code."""
    found = backups(database_path())
    if not found:
        print_line("No backups yet; one is made on each day with a chat.")
    now = time.time()
    for backup in found:
        state = problem_of(backup)
        about = f"{human_when(backup.made, now)}  {human_bytes(backup.nbytes)}"
        print_line(f"{backup.name}  {about}" + (f"  (damaged: {one_line(state)})" if state else ""))
    return ExitCode.OK


def restore_backup(name: str | None, *, yes: bool) -> int:
    """Replace the database by a backup; return the exit code.

    Args:
        name: Name of the backup; None for the newest intact one.
        yes: Do not ask, even if the database is intact.

    Raises:
        StoreError: The backup does not exist or is damaged, or another process uses the database.
        ConfigError: The database is intact, stdin is not a terminal, and `yes` was not given.
    """
    database = database_path()
    backup = _backup(name)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(backup.made))
    if not yes and not _may_replace(database, when):
        print_line("Nothing was restored.")
        return ExitCode.FAILURE
    moved = restore(database, backup)
    try:
        content = f", with {plural(session_count(backup), 'session')}"
    except StoreError:  # the disk, or the number of open files: the backup is restored
        content = ""
    print_line(f"Restored the backup of {when}{content}.")
    if moved is not None:
        print_line(f"The previous database is now {moved}; only that file has the messages since then.")
    return ExitCode.OK


def _may_replace(database: Path, when: str) -> bool:
    """Whether a backup may replace the database: asks unless the database is damaged or empty."""
    try:
        findings = examine(database) if database.exists() else HealthReport([])
    except StoreError:
        return True
    if findings.problems or not findings.sessions:
        return True
    state = f"the database is intact and has {plural(findings.sessions, 'session')}"
    question = f"{state[0].upper()}{state[1:]}. Replace it with the backup of {when}?"
    return _is_agreed(question, f"{state}; give --yes to replace it with the backup of {when}")


def _backup(name: str | None) -> Backup:
    database = database_path()
    found = backups(database)
    if not found:
        raise StoreError(f"no backup found in {backup_folder(database)}; one is made on each day with a chat")
    if name is None:
        intact = next((backup for backup in found if not problem_of(backup)), None)
        if intact is None:
            raise StoreError(f"none of the {len(found)} backups in {backup_folder(database)} can be read")
        return intact
    for backup in found:
        if name in (backup.name, backup.path.stem):
            return backup
    raise StoreError(f"no backup named {name!r}; `streamchat sessions backups` lists them")
