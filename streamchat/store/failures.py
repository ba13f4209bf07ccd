"""Failures of the database as one sentence: what failed, and what to do about this cause."""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamchat.base.errors import StoreError

PROBE_BYTES = 256 * 1024
"""Written to find out why SQLite could not write; more than the files that it creates when it opens a database."""
_WRITABLE = "make its folder writable, or choose another place with STREAMCHAT_HOME"
_BY_ERRNO = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "your disk quota is used up; free some of it",
    errno.EROFS: "its disk is mounted read-only; choose another place with STREAMCHAT_HOME",
    errno.EIO: "the disk reports an error; check it, and copy the folder to another one",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine; close some programs",
    errno.ENAMETOOLONG: "the path is too long; choose another place with STREAMCHAT_HOME",
    errno.ENOTDIR: "a part of its path is a file; choose another place with STREAMCHAT_HOME",
    errno.EEXIST: "a file has the name of its folder; make its folder writable by moving that file away",
}
_damage_advice: Callable[[Path], str] | None = None


def advise_on_damage(advice: Callable[[Path], str]) -> None:
    """Have `advice` say what to do about a damaged database; '' leaves it to this module."""
    global _damage_advice
    _damage_advice = advice


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Turn failures of SQLite and of the file system into `StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be used: {error}; {_advice(path, error)}") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be used: {error.strerror or error}; {advice_on(error.errno)}") from error


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite found that the file is not a database, is not sound, or lacks a table."""
    name = getattr(error, "sqlite_errorname", "") or ""
    return name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or name == "SQLITE_ERROR"


def is_busy(error: BaseException | None) -> bool:
    """Whether another connection holds a lock."""
    name = getattr(error, "sqlite_errorname", "") or ""
    return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def is_full(error: BaseException | None) -> bool:
    """Whether there is no room on the disk."""
    return getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"


def advice_on(code: int | None) -> str:
    """What to do about an errno."""
    return _BY_ERRNO.get(code or 0, _WRITABLE)


def _advice(path: Path, error: sqlite3.Error) -> str:
    if is_full(error):
        return _BY_ERRNO[errno.ENOSPC]
    if is_damage(error):
        offered = _damage_advice(path) if _damage_advice is not None else ""
        return offered or "the file is damaged; move it away (it is not touched) and a new one is begun"
    if is_busy(error):
        return "another program keeps it locked; close that"
    # SQLite says that it could not open or write something, and not why
    return advice_on(why_not_writable(path.parent))


def why_not_writable(folder: Path) -> int | None:
    """The errno of writing a small file into `folder`; None when that succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None
