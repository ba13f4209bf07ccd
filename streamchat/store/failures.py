"""Database failures as one sentence: what failed, and what to do about its cause."""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from streamchat.base.atomic_files import advice_on
from streamchat.base.errors import StoreError, reason_of, short

PROBE_BYTES = 256 * 1024
"""Size of a test write that finds out why SQLite could not write; larger than the files that opening creates."""
SQLITE_FILES = 4
"""Files that SQLite opens at once at most, besides the first: the log, its index, a journal, and the folder."""
SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises: the second where its message repeats text of the file that is not valid UTF-8."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Reader = TypeVar("Reader", bound="HasPath")
_registered_advice: Callable[[Path], str] | None = None


def advise_on_damage(advice: Callable[[Path], str]) -> None:
    """Register `advice`, which says what to do about a damaged database; '' selects the default advice."""
    global _registered_advice
    _registered_advice = advice


@contextmanager
def as_store_errors(path: Path) -> Iterator[None]:
    """Convert failures of SQLite and of the file system into `StoreError`."""
    try:
        yield
    except SQLITE_ERRORS as error:
        raise StoreError(f"{path} cannot be used: {text_of(error)}; {_advice(path, error)}") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be used: {reason_of(error)}; {advice_on(error.errno)}") from error


class HasPath(Protocol):
    """Something that belongs to one database."""

    path: Path


def reads_rows(
    method: Callable[Concatenate[Reader, Arguments], Result],
) -> Callable[Concatenate[Reader, Arguments], Result]:
    """Decorate a method that reads rows: a damaged schema gives them other columns, or values of other types."""

    @wraps(method)
    def checked(reader: Reader, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(reader, *args, **kwargs)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise StoreError(
                f"{reader.path} cannot be used: its tables are not those of streamchat ({short(error)}); "
                f"{damage_advice(reader.path)}"
            ) from error

    return checked


def is_damage(error: BaseException | None) -> bool:
    """Return whether SQLite found that the file is not a database, is damaged, or lacks a table."""
    name = getattr(error, "sqlite_errorname", "") or ""
    is_named = name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or name == "SQLITE_ERROR"
    return is_named or isinstance(error, UnicodeDecodeError)


def text_of(error: Exception) -> str:
    """Return SQLite's message, also one that repeats text that is not valid UTF-8."""
    if not isinstance(error, UnicodeDecodeError):
        return str(error)
    return short(error.object.split(b"\0")[0].decode("utf-8", "replace"))


def is_busy(error: BaseException | None) -> bool:
    """Return whether another connection has a lock."""
    name = getattr(error, "sqlite_errorname", "") or ""
    return name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def is_full(error: BaseException | None) -> bool:
    """Return whether the disk is full."""
    return getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"


def _advice(path: Path, error: Exception) -> str:
    if is_full(error):
        return advice_on(errno.ENOSPC)
    if is_damage(error):
        return damage_advice(path)
    if is_busy(error):
        return "another program keeps it locked; close that program"
    # SQLite reports that it could not open or write a file, but not why
    return advice_on(why_not_writable(path.parent) or _size_limit_reached(path))


def damage_advice(path: Path) -> str:
    """Return what to do about the damaged database `path`."""
    offered = _registered_advice(path) if _registered_advice is not None else ""
    return offered or "the file is damaged; move it aside and a new one will be created"


def _size_limit_reached(path: Path) -> int | None:
    """Return EFBIG if a file of the database is about as large as files may become; None if not."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    sizes = [file.stat().st_size for file in (path, Path(f"{path}-wal")) if file.exists()]
    is_reached = limit != resource.RLIM_INFINITY and max(sizes, default=0) + PROBE_BYTES > limit
    return errno.EFBIG if is_reached else None


def why_not_writable(folder: Path) -> int | None:
    """Return the errno of writing a small file into `folder` and opening as many as SQLite; None if that succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file, ExitStack() as stack:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
            for _ in range(SQLITE_FILES):
                stack.callback(os.close, os.dup(file.fileno()))
    except OSError as error:
        return error.errno
    return None
