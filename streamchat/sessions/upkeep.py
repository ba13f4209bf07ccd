"""Maintains the user's database on a background thread: daily backups, and removal of deleted text."""

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
"""How long quitting waits for the upkeep to end."""


class Upkeep:
    """Runs the upkeep when the chat starts or has its first turn, and again on each new day.

    Args:
        store: A store that stays open until `stop` has returned.
        emit: Emits an event; called on the upkeep's thread.
    """

    def __init__(self, store: Store, emit: Callable[[ev.Event], None]) -> None:
        self._store, self._emit = store, emit
        self._stopped = threading.Event()
        self._worker: threading.Thread | None = None
        self._day = ""
        self._is_suggested = False

    def start_if_due(self) -> None:
        """Start the upkeep unless it has run today. Returns at once."""
        day = time.strftime("%Y-%m-%d")
        if day == self._day or (self._worker is not None and self._worker.is_alive()):
            return
        self._day = day
        self._worker = threading.Thread(target=self._work, name="streamchat-upkeep", daemon=True)
        self._worker.start()

    def stop(self) -> None:
        """Stop the upkeep; call this before the store is closed."""
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
                self._day = ""  # again after the first turn: an empty backup would be the only one of this day
                self._suggest_backup()
        except StoreError as error:
            _log.warning("upkeep failed", exc_info=True)
            self._emit(ev.Notice(f"{error}; the chat continues", "warning"))
        except Exception:  # must never affect the chat
            _log.exception("upkeep failed")

    def _suggest_backup(self) -> None:
        """Emit a notice, once, if the database is empty but a backup is not: the file may have been deleted."""
        from streamchat.store.restore import empty_database_notice

        if not self._is_suggested and (sentence := empty_database_notice(self._store.path)):
            self._is_suggested = True
            self._emit(ev.Notice(sentence, "warning"))
