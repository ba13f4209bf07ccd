"""Writes files in one step: readers never see half of one, and a crash or a full disk leaves none.

The contents go to a new file in the same folder, which then replaces the target in one step. With `durable`, the file
and its name are flushed to the disk (fsync): needed for data that exists nowhere else. Without it, a power failure may
lose the write, or leave an empty file in place of the old one; use this for data that can be computed again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from streamchat.base import paths

_log = logging.getLogger(__name__)

PRIVATE = 0o600
"""Mode of a file that only the user can read."""
PARTIAL = ".part"
"""Ending of the names of unfinished files."""
SHARED = 0o666
"""Mode of a file for others, too; the umask applies."""
_WRITABLE = "make its folder writable, or choose another folder with STREAMCHAT_HOME"
ADVICE = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "your disk quota is used up; free some of it",
    errno.EFBIG: "the file exceeds the size limit; raise it with `ulimit -f`",
    errno.EROFS: "its disk is mounted read-only; choose another folder with STREAMCHAT_HOME",
    errno.EIO: "the disk reports an error; check it, and copy the folder to another one",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine; close some programs",
    errno.ENAMETOOLONG: "the path is too long; choose another folder with STREAMCHAT_HOME",
    errno.ENOTDIR: "a part of its path is a file; choose another folder with STREAMCHAT_HOME",
    errno.EEXIST: "a file has the name of its folder; move that file aside",
}
"""errno of a failed write -> what to do; for others, `_WRITABLE`."""
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""errno of `os.link` on a file system without hard links."""


def advice_on(code: int | None) -> str:
    """Return what to do about the errno of a failed write."""
    return ADVICE.get(code or 0, _WRITABLE)


_OF_ANY_FOLDER = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE)


def advice_or(code: int | None, otherwise: str) -> str:
    """Return what to do about the errno of a failed write to a file that the user named.

    Args:
        code: The errno.
        otherwise: What to do if another name would help.
    """
    return advice_on(code) if code in _OF_ANY_FOLDER else otherwise


@contextmanager
def atomic_write(target: Path, *, durable: bool, mode: int = PRIVATE) -> Iterator[Path]:
    """Yield a new empty file to write, which replaces `target` if the block succeeds and is deleted otherwise.

    Args:
        target: Its folder is created if missing, readable only by the user.
        durable: Whether the file must survive a power failure from then on.
        mode: Permissions of the new file.

    Raises:
        OSError: The file cannot be written or renamed; `target` is unchanged, unless only flushing its name failed. See
            `advice_on`.
    """
    paths.private_dir(target.parent)
    partial = _partial(target)
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield partial
        if durable:
            paths.fsync(partial)
        os.replace(partial, target)
        if durable:
            paths.fsync(target.parent)
    finally:
        _remove_all(target.parent, partial.name)


def _remove_all(folder: Path, start: str, part: str = "") -> None:
    """Delete the files whose names begin with `start` and contain `part` behind it.

    These are unfinished files and, if they are databases, their journals.
    """
    with suppress(OSError):
        for name in os.listdir(folder):  # `glob` would compile a pattern for each file that is written, and keep it
            if name.startswith(start) and part in name[len(start) :]:
                with suppress(OSError):
                    os.unlink(folder / name)


def remove_partial(target: Path) -> None:
    """Delete unfinished contents of `target` that a killed process left; no other process may be writing it."""
    _remove_all(target.parent, f".{target.name}.", PARTIAL)


def write_text(target: Path, text: str, *, durable: bool, mode: int = PRIVATE) -> None:
    """Replace `target` by `text` in UTF-8; see `atomic_write`. Characters that cannot be encoded become `?`."""
    with atomic_write(target, durable=durable, mode=mode) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_json(target: Path, value: Any, *, durable: bool, indent: int | None = None) -> None:
    """Replace `target` by `value` as JSON in ASCII; see `atomic_write`."""
    write_text(target, json.dumps(value, indent=indent), durable=durable)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; {} if it is missing, unreadable or damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def save_result(file: Path, result: dict[str, Any], what: str) -> None:
    """Save a result that can be computed again; log a warning that names it (`what`) if it cannot be saved."""
    try:
        write_json(file, result, durable=False)
    except OSError as error:
        _log.warning("%s could not be saved and will be computed again: %s", what, error)


def save_checked(file: Path, value: Any, what: str) -> None:
    """Save a result like `save_result`, with a checksum: for values that would do harm if one of them changed."""
    save_result(file, {"value": value, "sha256": _checksum(value)}, what)


def read_checked(file: Path) -> Any:
    """Return the value that `save_checked` wrote; None if it is missing or damaged."""
    kept = read_json(file)
    value = kept.get("value")
    return value if kept.get("sha256") == _checksum(value) else None


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_new(target: Path, text: str, *, durable: bool) -> None:
    """Write a new private file in UTF-8; characters that cannot be encoded become `?`. Its folder must exist.

    The name appears with the contents: there is no moment at which the file exists and is empty.

    Raises:
        FileExistsError: `target` exists, also if another process has just created it.
        OSError: The file cannot be written; no `target` is left.
    """
    partial = _partial(target)
    try:
        with open(partial, "x", encoding="utf-8", errors="replace", opener=paths.private_opener) as file:
            file.write(text)
        if durable:
            paths.fsync(partial)
        _give_new_name(partial, target)
        try:
            if durable:
                paths.fsync(target.parent)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    finally:
        with suppress(OSError):
            partial.unlink()


def _give_new_name(partial: Path, target: Path) -> None:
    """Give a file a name that must be free, which `os.replace` does not ensure. Its old name may remain."""
    try:
        os.link(partial, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with open(target, "x", opener=paths.private_opener):
            pass  # the name is taken
        os.replace(partial, target)


def _partial(target: Path) -> Path:
    """Return an unused name for the unfinished contents of `target`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
