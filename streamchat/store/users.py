"""Which processes use a database: a lock that they share, and that whoever replaces the file has alone.

It is `flock` on a file of its own: released by the system when a process ends, and independent of SQLite's locks.
Windows refuses to rename a file that is open, so nothing is needed there.
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
    """Where the locks of a database and of its conversations are."""
    return path.parent / "locks"


class UserLock:
    """Held from construction until `release`.

    Args:
        path: The database.
        alone: No other process may use it.

    Raises:
        StoreError: Another process uses it, or replaces it at this moment.
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
            what = "is open in another streamchat; close it there first"
            raise StoreError(
                f"{path} {what if alone else 'is being restored from a backup; try again in a moment'}"
            ) from None
        except OSError:  # a file system without such locks
            os.close(handle)
            return
        self._handle = handle

    def release(self) -> None:
        """Let others have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
