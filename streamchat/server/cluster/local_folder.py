"""A local folder for the temporary files of one replica; folders of killed replicas are deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from streamchat.base.paths import private_dir


class LocalFolder:
    """A folder on this machine, from construction until `close`.

    Args:
        root: Folder of the folders of all replicas on this machine.
        name: Name of the replica.
    """

    def __init__(self, root: Path, name: str) -> None:
        private_dir(root)
        _delete_unused(root)
        self.path = root / name
        self._lock = FileLock(root / f"{name}.lock", is_singleton=False, thread_local=False)
        self._lock.acquire()
        private_dir(self.path)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def _delete_unused(root: Path) -> None:
    for path in root.glob("*.lock"):
        lock = FileLock(path, timeout=0, is_singleton=False)
        try:
            lock.acquire()
        except (Timeout, OSError):
            continue
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
        lock.release()
