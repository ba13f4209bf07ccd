"""Writes evicted tokens to the archive on a separate thread, so that no token waits for the disk."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from streamchat.base.errors import StoreError
from streamchat.cache.evicted import EvictedTokens
from streamchat.sessions.evicted_pages import Kind, to_bytes
from streamchat.store.evicted import FILE_BYTES, EvictedPage, EvictedPages

_log = logging.getLogger(__name__)
QUEUE_BYTES = 128 << 20
"""Memory for waiting tokens; beyond it, tokens are not archived."""
SMALLEST_FILE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of the archive, in bytes."""

    session: int
    in_all: int

    @property
    def file(self) -> int:
        """Size at which a new file is started. Files are deleted as a whole, so each has only a part of the limit."""
        return min(FILE_BYTES, max(SMALLEST_FILE, min(self.session, self.in_all) // 8))


class EvictedWriter:
    """Archives evicted tokens in the order in which they come.

    Args:
        pages: The archive.
        limits: Its limits.
        tell: Called with notices for the user, on the writer's thread.
    """

    def __init__(self, pages: EvictedPages, limits: Limits, tell: Callable[[str], None]) -> None:
        self._pages, self.limits, self._tell = pages, limits, tell
        self._jobs: deque[tuple[int, Callable[[], None]]] = deque()
        self._bytes = 0
        """Bytes of the jobs that wait or run."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._has_told = self._has_failed = False

    def put(self, session: str, page: EvictedPage, tokens: EvictedTokens, kind: Kind) -> None:
        """Queue tokens to be archived. If too many are waiting, drop them and log it."""
        if self._bytes + tokens.nbytes > QUEUE_BYTES:
            _log.warning("the disk is too slow: %d evicted tokens of turn %d are not archived", tokens.count, page.turn)
            return
        self._add(tokens.nbytes, lambda: self._append(session, page, tokens, kind))

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until the queue is empty; return False after the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def close(self) -> None:
        """Write the waiting tokens, and end the thread."""
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _add(self, nbytes: int, job: Callable[[], None]) -> None:
        with self._changed:
            if self._thread is None:
                self._closed = False
                self._thread = threading.Thread(target=self._run, name="evicted tokens", daemon=True)
                self._thread.start()
            self._jobs.append((nbytes, job))
            self._bytes += nbytes
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._closed)
                if not self._jobs:
                    return
                nbytes, job = self._jobs[0]
            try:
                job()
            except StoreError as error:
                self._failed(error)
            except Exception:
                _log.exception("evicted tokens were not archived")
            del job  # and the tensors with it
            with self._changed:
                self._jobs.popleft()
                self._bytes -= nbytes
                self._changed.notify_all()

    def _append(self, session: str, page: EvictedPage, tokens: EvictedTokens, kind: Kind) -> None:
        self._pages.append(session, page, to_bytes(tokens, kind), self.limits.file)
        last = self._pages.limit(session, self.limits.session, self.limits.in_all)
        self._has_failed = False
        if last:
            _log.info("the oldest evicted tokens of %s were deleted, up to those of turn %d", session, last)
            if not self._has_told:
                self._has_told = True
                self._tell(
                    f"The archive of this conversation's evicted turns is full; its oldest tokens, up to those evicted "
                    f"in turn {last}, were deleted. Raise archive_session_mb or archive_total_mb to keep more."
                )

    def _failed(self, error: StoreError) -> None:
        _log.warning("evicted tokens were not archived", exc_info=True)
        if not self._has_failed:
            self._has_failed = True
            with suppress(Exception):
                self._tell(f"{error}.")
