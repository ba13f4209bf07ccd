"""A lock on a database: shared by the processes that use it, exclusive for one that replaces the file.

It is `flock` on a separate file: the system releases it when a process exits, and it is independent of SQLite's locks.
Windows refuses to rename an open file, so no lock is needed there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from streamchat.base import paths
from streamchat.base.errors import StoreError

if sys.platform != "win32":
    import fcntl


def lock_folder(path: Path) -> Path:
    """Return the folder of the locks of a database and its sessions."""
    return path.parent / "locks"


class UserLock:
    """A lock on a database, from construction until `release`.

    Args:
        path: The database.
        alone: Lock exclusively: no other process may use the database.

    Raises:
        StoreError: Another process uses the database, or is replacing it.
    """

    def __init__(self, path: Path, *, alone: bool = False) -> None:
        self._handle: int | None = None
        if sys.platform == "win32":
            return
        folder = paths.private_dir(lock_folder(path))
        handle = os.open(folder / f"{path.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            what = "is open in another streamchat process; close it there first"
            raise StoreError(
                f"{path} {what if alone else 'is being restored from a backup; try again in a moment'}"
            ) from None
        except OSError:  # a file system without such locks
            os.close(handle)
            return
        self._handle = handle

    @property
    def is_held(self) -> bool:
        """Whether the file system has such locks, and this is one."""
        return self._handle is not None

    def release(self) -> None:
        """Release the lock."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
