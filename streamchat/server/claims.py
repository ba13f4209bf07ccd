"""Which session each request works on: one request per session at a time."""

from __future__ import annotations

import threading
from typing import Protocol

from streamchat.server.known import KnownSession, KnownSessions


class Owner(Protocol):
    """A request, which can be canceled."""

    @property
    def cancelled(self) -> threading.Event:
        """Set to stop it."""
        ...


class Claims:
    """Sessions that requests work on. Used on the model's thread.

    Args:
        known: The sessions that the server knows.
    """

    def __init__(self, known: KnownSessions) -> None:
        self._known = known
        self._sessions: dict[Owner, KnownSession] = {}

    def claim(self, owner: Owner, session: KnownSession) -> KnownSession:
        """Mark `session` as busy with a request, in place of the one that it worked on; return it."""
        self.free(owner)
        session.is_busy = True
        self._sessions[owner] = session
        return session

    def free(self, owner: Owner) -> None:
        """Let other requests use the session of a request; forget it if it is neither saved nor live."""
        session = self._sessions.pop(owner, None)
        if session is None:
            return
        session.is_busy = False
        session.touch()
        if not (session.is_saved or session.is_live):
            self._known.remove(session)

    def owner_of(self, session: KnownSession) -> Owner | None:
        """Return the request that works on a session."""
        return next((owner for owner, claimed in self._sessions.items() if claimed is session), None)
