"""One process a session: a lock file that the system lets go of when its holder ends, however that ends."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from streamchat import paths
from streamchat.errors import SessionError, StoreError


class SessionLock:
    """Held from construction until `release`.

    Args:
        folder: Of the lock files.
        session: Its id.
        holder: Process that is known to have it open, for the message.

    Raises:
        SessionError: Another process has it.
    """

    def __init__(self, folder: Path, session: str, holder: int | None = None) -> None:
        self.session = session
        try:
            self._lock = FileLock(paths.private_dir(folder) / f"{session}.lock", timeout=0, is_singleton=False)
            self._lock.acquire()
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


def is_locked(folder: Path, session: str) -> bool:
    """Whether some process has the session open."""
    try:
        SessionLock(folder, session).release()
    except SessionError:
        return True
    return False
