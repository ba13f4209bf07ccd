"""Database checks of `streamchat doctor`. Read-only; nothing is migrated."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from streamchat.base.errors import SessionError, StoreError
from streamchat.base.formatting import plural
from streamchat.store.backup import backup_folder, backups, newest_sound_backup
from streamchat.store.database import database_path
from streamchat.store.health import examine, is_repairable
from streamchat.store.lock import SessionLock
from streamchat.store.restore import empty_database_notice
from streamchat.store.users import lock_folder


def examine_database(problems: list[str]) -> dict[str, Any]:
    """Return rows about the database; append one sentence per fault to `problems`."""
    database = database_path()
    rows: dict[str, Any] = {}
    if database.exists():
        rows["database"] = _state(database, problems)
    found = backups(database)
    rows["backups"] = f"{len(found)} in {backup_folder(database)}" if found else "none yet"
    if found:
        rows["newest backup"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(found[0].made))
    return rows


def _state(database: Path, problems: list[str]) -> str:
    if not Path(f"{database}-wal").exists():  # checked before this process opens the database
        problems += [
            f"a running streamchat has the session {session} open, but {database}-wal was deleted: new turns are lost; "
            "copy what you need from its screen and quit it"
            for session in _open_sessions(database)
        ]
    try:
        findings = examine(database)
    except StoreError as error:
        problems.append(str(error))
        return "unusable"
    if not findings.problems:
        if not findings.sessions and (lost := empty_database_notice(database)):
            problems.append(lost)
        return f"intact, {plural(findings.sessions, 'session')}, {plural(findings.turns, 'turn')}"
    problems.append(f"{database} is damaged ({findings.problems[0]}); {_advice(database, findings.problems)}")
    return f"damaged: {'; '.join(findings.problems)}"


def _advice(database: Path, problems: list[str]) -> str:
    if is_repairable(problems):
        return "`streamchat sessions repair` rebuilds its indexes from the messages"
    if (backup := newest_sound_backup(database)) is not None:
        return f"`streamchat sessions restore-backup {backup.name}` moves it aside and restores that backup"
    return "copy it to a safe place, then move it aside so that a new one is created"


def _open_sessions(database: Path) -> list[str]:
    """Return the ids of the sessions that a running process has open."""
    found = []
    for file in sorted(lock_folder(database).glob("*.lock")):
        if file.name.startswith(database.name):
            continue  # the lock of the database itself
        try:
            SessionLock(lock_folder(database), file.stem, patience_s=0).release()
        except SessionError:
            found.append(file.stem)
    return found
