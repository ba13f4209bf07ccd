"""Writes evicted tokens to the archive on a separate thread, so that decoding does not wait for the disk."""

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
"""Maximum bytes of tokens that wait to be written; further tokens are not archived."""


@dataclass(frozen=True)
class Limits:
    """Limits of the archive, in bytes."""

    session: int
    """For one session."""
    in_all: int
    """For all sessions together."""

    @property
    def file(self) -> int:
        """Size at which a new file is started. Files are deleted as a whole, so each is a fraction of the limit."""
        return min(FILE_BYTES, min(self.session, self.in_all) // 8)

    @property
    def page(self) -> int:
        """Maximum size of a page. The file that it is appended to is not deleted, so the limits must allow both."""
        return min(self.session, self.in_all) - self.file


@dataclass(frozen=True)
class _Job:
    session: str
    page: EvictedPage
    tokens: EvictedTokens
    kind: Kind


class EvictedWriter:
    """Archives evicted tokens in the order in which they are queued.

    Args:
        pages: The archive.
        limits: Its limits.
        tell: Called with notices for the user, on the writer's thread.
    """

    def __init__(self, pages: EvictedPages, limits: Limits, tell: Callable[[str], None]) -> None:
        self._pages, self.limits, self._tell = pages, limits, tell
        self._jobs: deque[_Job] = deque()
        """Oldest first; the first one may be running."""
        self._is_running = False
        self._bytes = 0
        """Bytes of the jobs that wait or run."""
        self._dropped: dict[str, int] = {}
        """Session -> its oldest undone turn; the running job's page is then dropped after it is written."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._has_told = self._has_failed = False

    def start(self) -> bool:
        """Start the writer's thread if it is not running. Return False if it could not be started.

        Call this before memory runs out: if a new thread has no memory to start with, Python waits for it forever.
        """
        with self._changed:
            if self._thread is None:
                self._closed = False
                thread = threading.Thread(target=self._run, name="evicted tokens", daemon=True)
                try:
                    thread.start()
                except (RuntimeError, MemoryError):
                    _log.warning("evicted tokens are not archived: no thread could be started", exc_info=True)
                    return False
                self._thread = thread
            return True

    def put(self, session: str, page: EvictedPage, tokens: EvictedTokens, kind: Kind) -> None:
        """Queue tokens to be archived. If too many are waiting, drop the new ones and log a warning."""
        if self._bytes + tokens.nbytes > QUEUE_BYTES:
            _log.warning("the disk is too slow: %d evicted tokens of turn %d are not archived", tokens.count, page.turn)
            return
        self._add(_Job(session, page, tokens, kind))

    def waiting(self, session: str) -> list[tuple[EvictedPage, EvictedTokens]]:
        """Return the pages of a session that wait to be written or are being written, oldest first."""
        with self._changed:
            return [(job.page, job.tokens) for job in self._jobs if job.session == session]

    def drop_from(self, session: str, turn: int, timeout_s: float) -> None:
        """Drop the tokens that turn `turn` and later turns evicted, both written and queued ones.

        Args:
            session: Id of the session.
            turn: Number of the first turn.
            timeout_s: Maximum time to wait for a page that is being written.

        Raises:
            StoreError: The database cannot be written; the written tokens stay in the archive.
        """
        with self._changed:
            running = [self._jobs.popleft()] if self._is_running else []
            kept = [job for job in self._jobs if job.session != session or job.page.turn < turn]
            self._jobs = deque([*running, *kept])
            self._bytes = sum(job.tokens.nbytes for job in self._jobs)
            if any(job.session == session and job.page.turn >= turn for job in running):
                self._dropped[session] = min(turn, self._dropped.get(session, turn))
                self._changed.wait_for(lambda: session not in self._dropped, timeout_s)
        self._pages.drop_from(session, turn)

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

    def _add(self, job: _Job) -> None:
        with self._changed:
            if not self.start():
                return
            self._jobs.append(job)
            self._bytes += job.tokens.nbytes
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._closed)
                if not self._jobs:
                    return
                job, self._is_running = self._jobs[0], True
            try:
                self._append(job)
            except StoreError as error:
                self._failed(error)
            except Exception:
                _log.exception("evicted tokens were not archived")
            with self._changed:
                self._jobs.popleft()
                self._is_running = False
                self._bytes -= job.tokens.nbytes
                undone = self._dropped.pop(job.session, None)
                self._changed.notify_all()
            self._drop_late(job.session, undone)
            del job  # and the tensors with it

    def _drop_late(self, session: str, undone: int | None) -> None:
        """Drop the page that was being written when its turn was undone, because `drop_from` may have timed out."""
        if undone is not None:
            try:
                self._pages.drop_from(session, undone)
            except Exception:
                _log.warning("evicted tokens of turn %d stay in the archive", undone, exc_info=True)

    def _append(self, job: _Job) -> None:
        session = job.session
        data = to_bytes(job.tokens, job.kind)
        limits = self.limits
        if len(data) > limits.page:
            raise StoreError(
                f"{job.tokens.count:,} evicted tokens were not archived: they need {len(data) / 1e6:,.1f} MB, too much "
                "for the limits of the archive; raise archive_session_mb or archive_total_mb"
            )
        # before the page is written, so that the archive never exceeds its limits
        last = self._pages.limit(session, limits.session - len(data), limits.in_all - len(data), limits.file)
        self._pages.append(session, job.page, data, limits.file)
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
        _log.warning("evicted tokens were not archived: %s", error, exc_info=not self._has_failed)
        if not self._has_failed:
            self._has_failed = True
            with suppress(Exception):
                self._tell(f"{error}.")
