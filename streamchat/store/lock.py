"""One process a session: a lock file that the system lets go of when its holder ends, however that ends."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from streamchat.base import paths
from streamchat.base.errors import SessionError, StoreError
from streamchat.store.records import SessionInfo

PATIENCE_S = 0.5
"""Longer than a look of `is_open` lasts, which has the lock for a moment."""


class SessionLock:
    """Held from construction until `release`.

    Args:
        folder: Of the lock files.
        session: Its id.
        holder: Process that is known to have it open, for the message.
        patience_s: How long to wait for it.

    Raises:
        SessionError: Another process has it.
    """

    def __init__(
        self, folder: Path, session: str, holder: int | None = None, *, patience_s: float = PATIENCE_S
    ) -> None:
        self.session = session
        try:
            self._lock = FileLock(paths.private_dir(folder) / f"{session}.lock", timeout=patience_s, is_singleton=False)
            self._lock.acquire(poll_interval=0.02)
        except Timeout:
            who = f"process {holder}" if holder else "another process"
            raise SessionError(
                f"the conversation {session} is open in another streamchat ({who}); close it there, or start a new one "
                "without --resume"
            ) from None
        except OSError as error:
            raise StoreError(f"{folder} cannot be used: {error.strerror or error}; make it writable") from error

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()


def is_open(folder: Path, info: SessionInfo) -> bool:
    """Whether some process has the session open: it says so in the store, and it lives.

    Where nobody says so the lock is left alone: a look must not keep anybody from opening it.
    """
    if info.opened_by is None:
        return False
    try:
        SessionLock(folder, info.id, patience_s=0).release()
    except SessionError:
        return True
    return False
