"""The store of one replica: its own database, and the logs of the sessions that it owns in a shared folder.

The database is on this machine and is only a copy. A session is read into it when the replica takes the session over,
or looks for it. A finished turn is written to the database, then to the log; only then is it confirmed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamchat.base.errors import StoreError
from streamchat.store.lock import SessionLock
from streamchat.store.records import (
    SCOPE,
    CacheMark,
    ModelIdentity,
    NewSession,
    SessionInfo,
    StoredEviction,
    StoredSession,
    StoredTurn,
)
from streamchat.store.shared.folder import NEWEST, SharedFolder, Version, exchange_name
from streamchat.store.shared.log import line_of
from streamchat.store.store import Store
from streamchat.store.writing import random_id, replace_session

_log = logging.getLogger(__name__)


@dataclass
class _Changes:
    """What the log of a session lacks."""

    first: int | None = None
    """All turns from this one on; None for none."""
    turns: dict[int, StoredTurn] = field(default_factory=dict)
    evictions: list[StoredEviction] = field(default_factory=list)

    def add(self, turns: Sequence[StoredTurn], evictions: Sequence[StoredEviction], undone_from: int | None) -> None:
        """Add the changes of a write, in the order of `Store.write`."""
        if undone_from is not None:
            self._start_at(undone_from)
            self.turns = {number: turn for number, turn in self.turns.items() if number < undone_from}
            self.evictions = [each for each in self.evictions if each.turn < undone_from]
        for turn in turns:
            self._start_at(turn.number)
            self.turns[turn.number] = turn
        self.evictions += evictions

    def _start_at(self, turn: int) -> None:
        self.first = turn if self.first is None else min(self.first, turn)


class ReplicaState:
    """What all stores of one replica share.

    Args:
        folder: The shared folder.
    """

    def __init__(self, folder: SharedFolder) -> None:
        self.folder = folder
        self.changes: dict[str, _Changes] = {}
        self.versions: dict[str, Version] = {}
        """The state of the log that the database has of a session."""
        self.exchanges: dict[str, deque[str]] = {}
        """The keys by which a session is found now."""


class SharedStore(Store):
    """The store of a replica.

    Args:
        path: Its own database.
        replica: What all stores of the replica share.
    """

    def __init__(self, path: Path, replica: ReplicaState) -> None:
        super().__init__(path)
        self._replica, self._folder = replica, replica.folder

    # --- owning -----------------------------------------------------------------------------------------------

    def lock_session(self, name: str) -> tuple[SessionInfo, SessionLock]:
        """Own a session and lock it; a replica that had it can no longer confirm turns.

        Raises:
            MissingSessionError: There is no such session.
            SessionError: A chat of this replica has locked it.
            StoreError: It cannot be read.
        """
        found = self._folder.take_over(name)
        if found is not None:
            try:
                self._replace(name, *found)
            except BaseException:  # the database has not got it
                self._folder.disown(name)
                raise
        return self._lock_found(super().find(name))

    def owns(self, session: str) -> bool:
        """Return whether this replica owns a session for sure: not if the shared folder cannot be read."""
        try:
            return self._folder.owns(session)
        except StoreError:
            _log.warning("the owner of a session cannot be read", exc_info=True)
            return False

    def create_locked(
        self, title: str, identity: ModelIdentity, settings: Mapping[str, Any], system_ids: Iterable[int] = ()
    ) -> SessionLock:
        """Create a session that this replica owns; return its lock."""
        while not self._folder.create(session := random_id()):
            pass
        return self._create_locked(session, NewSession(title, identity, settings), system_ids)

    # --- writing ----------------------------------------------------------------------------------------------

    def write(
        self,
        session: str,
        *,
        turns: Sequence[StoredTurn] = (),
        cache: CacheMark | None = None,
        evictions: Sequence[StoredEviction] = (),
        undone_from: int | None = None,
        identity: ModelIdentity | None = None,
        system_ids: Iterable[int] = (),
        is_opened: bool = False,
    ) -> None:
        """Write changes of a session; those of finished turns are in its log when this returns.

        The log gets an undo with the turn that follows, so that no confirmed turn is lost before another replaces it.

        Raises:
            SessionMovedError: Another replica owns the session.
        """
        super().write(
            session,
            turns=turns,
            cache=cache,
            evictions=evictions,
            undone_from=undone_from,
            identity=identity,
            system_ids=system_ids,
            is_opened=is_opened,
        )
        changes = self._replica.changes.setdefault(session, _Changes())
        changes.add(turns, evictions, undone_from)
        if turns and turns[-1].state == "done":
            self._write_log(session, changes)

    def _write_log(self, session: str, changes: _Changes) -> None:
        if self._folder.ownership(session).has_log:
            info, system_ids, first = super().find(session), None, changes.first or 1
            turns, evictions = tuple(changes.turns.values()), tuple(changes.evictions)
        else:
            stored = super().load(session)
            info, system_ids, first = stored.info, stored.system_ids, 1
            turns, evictions = stored.turns, stored.evictions
        del self._replica.changes[session]
        line = line_of(info, system_ids, first, turns, evictions)
        self._replica.versions[session] = self._folder.append(session, line)
        self._folder.drop_snapshots(session, info.turns)
        self._add_exchanges(session, info, turns)

    def _add_exchanges(self, session: str, info: SessionInfo, turns: Sequence[StoredTurn]) -> None:
        known = self._replica.exchanges.setdefault(session, deque())
        for turn in turns[-NEWEST:]:
            key = exchange_name(*_scope_of(info), turn.text, turn.reply)
            if key not in known:
                known.append(key)
                self._folder.add_exchange(session, key)
        while len(known) > NEWEST:
            self._folder.drop_exchange(session, known.popleft())

    # --- reading ----------------------------------------------------------------------------------------------

    def find(self, name: str) -> SessionInfo:
        """Return a session; that of another replica as it is now."""
        self._refresh(name)
        return super().find(name)

    def load(self, session: str) -> StoredSession:
        """Load a session; that of another replica as it is now."""
        self._refresh(session)
        return super().load(session)

    def session_after(self, scope: str, system: str, message: str, reply: str) -> str | None:
        """Return a session of any replica with this exchange among its newest ones; None without one."""
        return self._folder.session_after(exchange_name(scope, system, message, reply))

    def snapshot_path(self, session: str) -> Path:
        """Return the path of a new snapshot of a session that this replica owns."""
        return self._folder.new_snapshot(session, super().find(session).turns)

    def newest_snapshot(self, session: str) -> Path:
        """Return the path of the snapshot of the current state, by whatever replica, whether it exists or not."""
        return self._folder.snapshot(session, super().find(session).turns)

    def _refresh(self, session: str) -> None:
        """Read a session of another replica again if its log has changed."""
        if self._folder.owns(session):
            return
        version = self._folder.version(session)
        if version is None or version == self._replica.versions.get(session):
            return
        if (found := self._folder.read(session)) is not None:
            self._replace(session, *found)

    def _replace(self, session: str, stored: StoredSession, version: Version) -> None:
        with self._open.write() as connection:
            replace_session(connection, stored)
        self._replica.changes.pop(session, None)
        self._replica.versions[session] = version
        self._replica.exchanges[session] = deque(
            exchange_name(*_scope_of(stored.info), turn.text, turn.reply) for turn in stored.turns[-NEWEST:]
        )


def _scope_of(info: SessionInfo) -> tuple[str, str]:
    """Return the scope and the system prompt of a session."""
    return str(info.settings.get(SCOPE, "")), str(info.settings.get("system_prompt", ""))
