"""Finds sessions in the store that the server does not know yet, for example after a restart."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from streamchat.base.errors import SessionError, StoreError
from streamchat.base.sanitize import one_line
from streamchat.config.settings import Settings
from streamchat.server.calls import Prompt
from streamchat.server.known import KnownSession, KnownSessions, turn_key
from streamchat.store.database import database_identity
from streamchat.store.records import SCOPE, SessionInfo, StoredSession
from streamchat.store.store import Store

_log = logging.getLogger(__name__)
MAX_CANDIDATES = 8
MAX_LISTED = 200
"""Sessions among which the newest one is looked for."""


class SavedSessions:
    """Reads sessions that the loaded model can continue.

    Args:
        store: An open store.
        fingerprint: Returns the fingerprint of the loaded model.
        settings: The settings of the server.
    """

    def __init__(self, store: Store, fingerprint: str, settings: Settings) -> None:
        self._store, self._fingerprint, self._settings = store, fingerprint, settings

    def find(self, session: str) -> KnownSession | None:
        """Return the session with this id, without its turns; None if there is none that can be continued."""
        try:
            info = self._store.find(session)
        except SessionError:
            return None
        return self._known(info) if info.id == session and self._fits(info) else None

    def named(self, name: str) -> KnownSession:
        """Return the session with this id, or the start of it, without its turns.

        Raises:
            SessionError: There is none, or the loaded model cannot continue it.
        """
        info = self._store.find(name)
        if not self._fits(info):
            raise SessionError(
                f"the session {info.id} was recorded with another model ({one_line(info.model_name)}); "
                "serve that model, or attach to another session"
            )
        return self._known(info)

    def newest(self) -> KnownSession | None:
        """Return the most recently used session that the loaded model can continue, without its turns."""
        return next((self._known(info) for info in self._store.sessions(limit=MAX_LISTED) if self._fits(info)), None)

    def info(self, session: str) -> SessionInfo:
        """Return what the store knows about a session; raises SessionError."""
        return self._store.find(session)

    @property
    def identity(self) -> str:
        """A text that tells the database from others: two programs with the same one share their sessions."""
        return database_identity(self._store.path)

    def candidates(self, prompt: Prompt, known: KnownSessions) -> Iterator[KnownSession]:
        """Yield sessions with a message of the history, the most recently used first, that are not in `known`.

        A session that cannot be read is left out: the request has its history, and can continue in another one.
        """
        newest = next((each.message for each in reversed(prompt.history) if each.message), None)
        if newest is None:
            return
        last, system = prompt.history[-1], prompt.system or self._settings.system_prompt
        elsewhere = self._store.session_after(prompt.scope, system, last.message or "", last.reply)
        here = self._store.sessions_with_message(newest, MAX_CANDIDATES)
        for id_ in dict.fromkeys(filter(None, (elsewhere, *here))):
            if id_ in known:
                continue
            try:
                stored = self._store.load(id_)
            except StoreError as error:
                _log.warning("a session is not continued: %s", error)
                continue
            if self._fits(stored.info):
                yield self._known(stored.info, stored)

    def _fits(self, info: SessionInfo) -> bool:
        return info.fingerprint == self._fingerprint

    def _known(self, info: SessionInfo, stored: StoredSession | None = None) -> KnownSession:
        prompt = info.settings.get("system_prompt", "")
        system = None if prompt == self._settings.system_prompt else str(prompt)
        session = KnownSession(system, str(info.settings.get(SCOPE, "")), id=info.id)
        if stored is not None:
            session.set_turns(turn_key(turn.text, turn.reply) for turn in stored.turns)
        return session
