"""Maintains the user's database on a thread of its own: daily backups, and removal of deleted words."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.base.errors import StoreError

if TYPE_CHECKING:
    from streamchat.store.store import Store

_log = logging.getLogger(__name__)
LEAVE_S = 10.0
"""How long quitting waits for a step of the upkeep to end."""


class Upkeep:
    """Does what is due when the chat begins or has its first turn, and again on each new day.

    Args:
        store: Open until `stop` has returned.
        tell: Emits an event; called on the upkeep's thread.
    """

    def __init__(self, store: Store, tell: Callable[[ev.Event], None]) -> None:
        self._store, self._tell = store, tell
        self._stopped = threading.Event()
        self._worker: threading.Thread | None = None
        self._day = ""
        self._is_told = False

    def consider(self) -> None:
        """Start what is due, unless that was done today. Returns at once."""
        day = time.strftime("%Y-%m-%d")
        if day == self._day or (self._worker is not None and self._worker.is_alive()):
            return
        self._day = day
        self._worker = threading.Thread(target=self._work, name="streamchat-upkeep", daemon=True)
        self._worker.start()

    def stop(self) -> None:
        """Stop it; call this before the store is closed."""
        self._stopped.set()
        if self._worker is not None:
            self._worker.join(LEAVE_S)

    def _work(self) -> None:
        from streamchat.store.backup import back_up_daily
        from streamchat.store.scrub import pending_mark

        try:
            if pending_mark(self._store.path).exists():
                self._store.scrub()
            if self._store.sessions(limit=1):
                back_up_daily(self._store.path, self._stopped.is_set)
            else:
                self._day = ""  # again behind the first turn: an empty backup would be the only one of this day
                self._tell_of_backup()
        except StoreError as error:
            _log.warning("upkeep failed", exc_info=True)
            self._tell(ev.Notice(f"{error}; the chat goes on", "warning"))
        except Exception:  # never the chat's concern
            _log.exception("upkeep failed")

    def _tell_of_backup(self) -> None:
        """The database is empty: say, once, if a backup is not. Somebody may have deleted the file."""
        from streamchat.store.restore import empty_database_notice

        if not self._is_told and (sentence := empty_database_notice(self._store.path)):
            self._is_told = True
            self._tell(ev.Notice(sentence, "warning"))
