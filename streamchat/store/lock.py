"""One process per session: an OS file lock, released when its process exits."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from streamchat.base import paths
from streamchat.base.errors import SessionError, StoreError, reason_of
from streamchat.store.records import SessionInfo

PATIENCE_S = 0.5
"""How long to wait for a lock: longer than `is_open` keeps it."""


class SessionLock:
    """A lock on one session, from construction until `release`.

    Args:
        folder: Folder of the lock files.
        session: Session id.
        holder: Id of the process that is known to have the session open, for the message.
        patience_s: How long to wait for the lock.

    Raises:
        SessionError: Another process has the lock.
    """

    def __init__(
        self, folder: Path, session: str, holder: int | None = None, *, patience_s: float = PATIENCE_S
    ) -> None:
        self.session = session
        try:
            self._lock = FileLock(
                paths.private_dir(folder) / f"{session}.lock",
                timeout=patience_s,
                thread_local=False,  # another thread may release it
                is_singleton=False,
            )
            self._lock.acquire(poll_interval=0.02)
        except Timeout:
            who = "another streamchat process" + (f" (id {holder})" if holder else "")
            raise SessionError(
                f"the session {session} is open in {who}; close it there, or start a new one without --resume"
            ) from None
        except OSError as error:
            raise StoreError(f"{folder} cannot be used: {reason_of(error)}; make it writable") from error

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()


def is_open(folder: Path, info: SessionInfo) -> bool:
    """Return whether a live process has the session open.

    If the store names no process, the lock is not tried: this check must not prevent another process from opening the
    session.
    """
    if info.opened_by is None:
        return False
    try:
        SessionLock(folder, info.id, patience_s=0).release()
    except SessionError:
        return True
    return False
