"""Seals a compiled library with a checksum at its end, and opens it only if every byte is unchanged.

A power failure or a full disk can leave a library truncated or zeroed; loading it would crash the process (SIGBUS,
SIGSEGV). The loader ignores data after the sections that the library's header lists, such as the checksum.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

_log = logging.getLogger(__name__)

CHECKSUM_BYTES = hashlib.sha256().digest_size
MAX_BYTES = 64 << 20
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def seal(descriptor: int, key: str) -> None:
    """Append a checksum of the open file and `key`, and flush the file to disk."""
    content = _content(descriptor)
    os.pwrite(descriptor, _checksum(content, key), len(content))
    os.fchmod(descriptor, 0o700)
    os.fsync(descriptor)


def open_sealed(path: Path, key: str) -> int | None:
    """Return a descriptor of the library at `path`; None if it is missing, not ours, or not as `seal` wrote it.

    Checks owner and contents through the descriptor: anyone who can write to a parent folder could replace the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _log.warning("the compiled kernels in %s cannot be opened: %s", path, error)
        return None
    try:
        defect = _find_defect(descriptor, key)
    except OSError as error:
        defect = str(error)
    if not defect:
        return descriptor
    os.close(descriptor)
    _log.warning("the compiled kernels in %s are not used: %s", path, defect)
    return None


def read_library(descriptor: int) -> bytes:
    """Return the contents of an open, sealed library without the checksum."""
    return _content(descriptor)[:-CHECKSUM_BYTES]


def is_ours_alone(status: os.stat_result) -> bool:
    """Return whether only this user (and root) may change the file or folder."""
    return status.st_uid == os.getuid() and not status.st_mode & OTHERS_MAY_WRITE


def _find_defect(descriptor: int, key: str) -> str:
    """Return why the file cannot be used; '' if it is intact and ours."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if not is_ours_alone(status):
        return "the file is writable by others"
    if not CHECKSUM_BYTES < status.st_size <= MAX_BYTES:
        return f"its size is {status.st_size} bytes"
    content = _content(descriptor)
    if _checksum(content[:-CHECKSUM_BYTES], key) != content[-CHECKSUM_BYTES:]:
        return "its checksum is wrong"
    return ""


def _content(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read(MAX_BYTES + 1)


def _checksum(content: bytes, key: str) -> bytes:
    digest = hashlib.sha256(key.encode() + b"\0")
    digest.update(content)
    return digest.digest()
