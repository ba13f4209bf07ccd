"""Writes snapshots on a thread of its own: writing and flushing one takes longer than putting it back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from streamchat.base.errors import StoreError

_log = logging.getLogger(__name__)
MAX_WAITING = 2
"""Snapshots in memory at a time; the next one waits for the first of them."""


class SnapshotWriter:
    """Writes the snapshots of all sessions, in order. Used on the model's thread.

    Args:
        failed: Called with the error of a snapshot that could not be written, on the writer's thread.
    """

    def __init__(self, failed: Callable[[StoreError], None]) -> None:
        self._failed = failed
        self._pool = ThreadPoolExecutor(1, "streamchat-snapshots")
        self._waiting: dict[str, Future[None]] = {}

    def write(self, session: str, save: Callable[[], object]) -> None:
        """Call `save` soon, which writes the snapshot of `session`."""
        self._waiting = {each: future for each, future in self._waiting.items() if not future.done()}
        self.finish(session)
        while len(self._waiting) >= MAX_WAITING:
            self.finish(next(iter(self._waiting)))
        self._waiting[session] = self._pool.submit(self._write, save)

    def finish(self, session: str) -> None:
        """Wait for the snapshot of `session`, if there is one to write."""
        future = self._waiting.pop(session, None)
        if future is not None:
            future.result()

    def close(self) -> None:
        """Write all snapshots."""
        self._pool.shutdown()

    def _write(self, save: Callable[[], object]) -> None:
        try:
            save()
        except StoreError as error:
            _log.warning("no snapshot", exc_info=True)
            self._failed(error)
        except Exception:
            _log.exception("no snapshot")
