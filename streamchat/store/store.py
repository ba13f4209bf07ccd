"""Reads and writes sessions. All stores of a process on one file share its connections; `Store` is thread-safe."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamchat.base.errors import MissingSessionError, SessionError, StoreError
from streamchat.store.clock import latest_time
from streamchat.store.database import Database, acquire, database_identity, database_path, release
from streamchat.store.evicted import EvictedPages
from streamchat.store.failures import as_store_errors, reads_rows
from streamchat.store.forks import Fork, adopt_children, insert_fork
from streamchat.store.health import repair
from streamchat.store.lock import SessionLock
from streamchat.store.records import (
    CacheMark,
    ModelIdentity,
    NewSession,
    SearchHit,
    SessionInfo,
    StoredEviction,
    StoredSession,
    StoredTurn,
    checked_title,
    clean,
    pack_ids,
)
from streamchat.store.rows import figures_of, info_of, mark_of, moment, session_of
from streamchat.store.scrub import mark_pending, remove_orphans, scrub
from streamchat.store.search import excerpt, like, query_of, without_copies
from streamchat.store.users import lock_folder
from streamchat.store.writing import insert_evictions, insert_session, repair_session, write_turn

_INFO = """
    SELECT s.*, (SELECT count(*) FROM turns t WHERE t.session = s.id AND t.state != 'undone') AS turns
    FROM sessions s
"""
_NEWEST_FIRST = "ORDER BY s.updated > ?, s.updated DESC"
"""Its value is `latest_time()`: sessions that were written while the clock was ahead come last."""
SHARED = 8
"""How many rows are read for each message that a search returns, since forks share messages."""
_INDEX = "JOIN words ON words.rowid = m.id"


class Store:
    """The database of saved sessions. A context manager that closes it.

    Args:
        path: The file; the user's database by default.

    Raises:
        StoreError: The file cannot be opened. Every other method also raises it if the file fails later.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or database_path()
        self._database: Database | None = acquire(self.path)
        self._identity = database_identity(self.path)
        self.evicted = EvictedPages(self.path.parent / "evicted", lambda: self._open)
        """Keys and values of evicted tokens."""

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; no write is pending."""
        database, self._database = self._database, None
        if database is not None:
            release(database)

    @property
    def _open(self) -> Database:
        if self._database is None:
            raise StoreError(f"{self.path} was closed; open it again")
        return self._database

    def _write(self, sql: str, *values: object) -> None:
        with self._open.write() as connection:
            connection.execute(sql, values)

    def _read(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self._open.read() as connection:
            return connection.execute(sql, values).fetchall()

    @property
    def is_replaced(self) -> bool:
        """Whether the file was deleted or replaced since this store was opened, also after it was closed."""
        return database_identity(self.path) != self._identity

    def be_patient(self) -> None:
        """Let the next write wait for other programs, although one has waited in vain."""
        self._open.be_patient()

    def snapshot_path(self, session: str) -> Path:
        """Return the path of a session's cache snapshot, whether it exists or not."""
        return self.path.parent / "snapshots" / f"{session}.safetensors"

    def newest_snapshot(self, session: str) -> Path:
        """Return the path of the snapshot to restore, whether it exists or not."""
        return self.snapshot_path(session)

    @property
    def is_user_database(self) -> bool:
        """Whether it is the user's database, not that of a replay."""
        return os.path.realpath(self.path) == os.path.realpath(database_path())

    @property
    def lock_folder(self) -> Path:
        """The folder of the session locks."""
        return lock_folder(self.path)

    # --- owning -------------------------------------------------------------------------------------------------

    def lock_session(self, name: str) -> tuple[SessionInfo, SessionLock]:
        """Lock the session that `name` refers to (see `find`) for this process; return it and the lock.

        Raises:
            SessionError: The session does not exist, or another process has locked it.
        """
        return self._lock_found(self.find(name))

    def _lock_found(self, found: SessionInfo) -> tuple[SessionInfo, SessionLock]:
        """Lock a session; return it as it is now, since whoever had it locked may have changed or deleted it."""
        lock = SessionLock(self.lock_folder, found.id, found.opened_by)
        try:
            return self._info(found.id), lock
        except BaseException:
            lock.release()
            raise

    def owns(self, session: str) -> bool:
        """Return whether a session that is locked may be written."""
        return True

    # --- writing ------------------------------------------------------------------------------------------------

    def create(
        self, title: str, identity: ModelIdentity, settings: Mapping[str, Any], system_ids: Iterable[int] = ()
    ) -> str:
        """Create a session; return its new id."""
        with self._open.write() as connection:
            return insert_session(connection, NewSession(title, identity, settings), system_ids)

    def create_locked(
        self, title: str, identity: ModelIdentity, settings: Mapping[str, Any], system_ids: Iterable[int] = ()
    ) -> SessionLock:
        """Create a session that this process has open; return its lock. If the lock fails, nothing is created."""
        return self._create_locked(None, NewSession(title, identity, settings), system_ids)

    def _create_locked(self, session: str | None, new: NewSession, system_ids: Iterable[int]) -> SessionLock:
        lock: SessionLock | None = None
        try:
            with self._open.write() as connection:
                session = insert_session(connection, new, system_ids, session)
                lock = SessionLock(self.lock_folder, session)
                connection.execute("UPDATE sessions SET opened_by = ? WHERE id = ?", (os.getpid(), session))
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return lock

    def add(self, sessions: Iterable[NewSession]) -> list[str]:
        """Create sessions with their turns, all or none; return their ids."""
        with self._open.write() as connection:
            return [insert_session(connection, session) for session in sessions]

    def fork(self, fork: Fork) -> str:
        """Create a fork of a session, in one transaction; return its new id.

        Raises:
            SessionError: The session, or one of its turns, does not exist.
        """
        with self._open.write() as connection:
            count = "SELECT count(*) FROM turns WHERE session = ? AND number <= ? AND state = 'done'"
            found = connection.execute(count, (fork.parent, fork.turns)).fetchone()[0]
            if found != fork.turns:
                raise SessionError(
                    f"the session {fork.parent} has only {found} of {fork.turns} turns; nothing is forked"
                )
            return insert_fork(connection, fork)

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
        """Write changes of a session in one transaction.

        Args:
            session: Session id.
            turns: New and changed turns.
            cache: The current state of the cache.
            evictions: Evictions since the last call.
            undone_from: Turns from this number on were undone before all of this; search still finds them.
            identity: The model that the session continues with, if it changed. Its names are not written.
            system_ids: Ids of the system prompt for `identity`.
            is_opened: Whether this process has just opened it; see `mark_open`.
        """
        with self._open.write() as connection:
            if is_opened:
                connection.execute("UPDATE sessions SET opened_by = ? WHERE id = ?", (os.getpid(), session))
            if identity is not None:
                connection.execute(
                    "UPDATE sessions SET dtype = ?, fingerprint = ?, tokenizer = ?, system_ids = ? WHERE id = ?",
                    (identity.dtype, identity.fingerprint, identity.tokenizer, pack_ids(system_ids), session),
                )
            if undone_from is not None:
                connection.execute(
                    "UPDATE turns SET state = 'undone' WHERE session = ? AND number >= ? AND state != 'undone'",
                    (session, undone_from),
                )
                connection.execute("DELETE FROM evictions WHERE session = ? AND turn >= ?", (session, undone_from))
            for turn in turns:
                write_turn(connection, session, turn, is_reencoded=identity is not None)
            insert_evictions(connection, session, evictions)
            if cache is not None:
                connection.execute(
                    "UPDATE sessions SET held = ?, pins = ?, compressions = ? WHERE id = ?",
                    (json.dumps(cache.held), json.dumps(cache.pins), cache.compressions, session),
                )
            connection.execute("UPDATE sessions SET updated = ? WHERE id = ?", (time.time(), session))

    def change(self, session: str, changes: Sequence[tuple[str, Any]], settings: Mapping[str, Any]) -> None:
        """Record changed settings, each as (name, value); `settings` are all settings in effect now."""
        with self._open.write() as connection:
            connection.executemany(
                "INSERT INTO changes (session, at, name, value) VALUES (?, ?, ?, ?)",
                [(session, time.time(), name, json.dumps(value)) for name, value in changes],
            )
            connection.execute("UPDATE sessions SET settings = ? WHERE id = ?", (json.dumps(dict(settings)), session))

    def set_model(self, session: str, identity: ModelIdentity, settings: Mapping[str, Any]) -> None:
        """Replace the model and settings that the file of an imported session named."""
        values = (clean(identity.model), clean(identity.model_name), json.dumps(dict(settings)))
        self._write("UPDATE sessions SET model = ?, model_name = ?, settings = ? WHERE id = ?", *values, session)

    def mark_open(self, session: str, process: int | None = None) -> None:
        """Record that `process`, this one by default, has the session open. For messages only; the lock decides."""
        self._write("UPDATE sessions SET opened_by = ? WHERE id = ?", process or os.getpid(), session)

    def mark_closed(self, session: str) -> None:
        """Record that the session was closed."""
        self._write("UPDATE sessions SET opened_by = NULL WHERE id = ?", session)

    def write_live(self, session: str, sample: Mapping[str, Any]) -> None:
        """Replace the live figures of a session."""
        self._write(
            "INSERT INTO live (session, at, sample) VALUES (?, ?, ?) "
            "ON CONFLICT (session) DO UPDATE SET at = excluded.at, sample = excluded.sample",
            session,
            time.time(),
            json.dumps(dict(sample)),
        )

    def rename(self, session: str, text: str) -> str:
        """Change the title of a session to `text`, on one line; return the title.

        Raises:
            ConfigError: `text` is not a title.
            MissingSessionError: The session was deleted.
        """
        title = checked_title(text)
        with self._open.write() as connection:
            changed = connection.execute("UPDATE sessions SET title = ? WHERE id = ?", (title, session)).rowcount
        if not changed:
            raise _missing(session)
        return title

    def delete(self, session: str) -> bool:
        """Delete a session, its cache snapshot, its archived tokens, and its text in all files of the database.

        Returns:
            Whether the text was removed from the files. If not, another program was using the database; the next
            program that opens it removes the text.

        Raises:
            StoreError: A file cannot be written; the session is not deleted.
        """
        with as_store_errors(self.path):
            mark_pending(self.path)
        with self._open.write() as connection:
            adopt_children(connection, session)
            connection.execute("DELETE FROM sessions WHERE id = ?", (session,))
        return self.scrub()

    def scrub(self) -> bool:
        """Remove the caches and archived tokens of deleted sessions, and their text from all files of the database.

        Returns:
            Whether that succeeded.
        """
        try:
            self.evicted.delete_orphans()
        except OSError:
            return False
        with self._open.exclusive() as connection:
            try:
                remove_orphans(connection, self.snapshot_path("").parent)
            except OSError:
                return False
            return scrub(connection, self.path)

    def repair(self) -> list[str]:
        """Rebuild all indexes from the tables; return the remaining faults of the file."""
        with self._open.exclusive() as connection:
            return repair(connection)

    def repair_session(self, stored: StoredSession) -> None:
        """Replace the damaged parts of a session by what `load` returned for them."""
        with self._open.write() as connection:
            repair_session(connection, stored)

    # --- reading ------------------------------------------------------------------------------------------------

    @reads_rows
    def sessions(self, words: str = "", limit: int | None = None) -> list[SessionInfo]:
        """Return sessions, newest first: all, or those whose title or messages have all `words`."""
        where, values, words = "", list[str](), clean(words)
        if query := query_of(words):
            condition, wanted = query.where()
            where = (
                "WHERE s.title LIKE ? ESCAPE '\\' OR s.id IN (SELECT t.session FROM messages m "
                f"{_INDEX if query.match else ''} JOIN turns t ON t.id = m.turn WHERE {condition})"
            )
            values = [like(words.strip()), *wanted]
        order = f"{_NEWEST_FIRST} LIMIT ?"
        rows = self._read(f"{_INFO} {where} {order}", *values, latest_time(), -1 if limit is None else limit)
        return [info_of(row) for row in rows]

    @reads_rows
    def find(self, name: str) -> SessionInfo:
        """Return the session that `name` refers to: 'last', an id, or the start of one.

        Raises:
            SessionError: No session or several sessions match.
        """
        name = clean(name)
        if name == "last":
            found = self._read(f"{_INFO} {_NEWEST_FIRST} LIMIT 1", latest_time())
        else:
            start = f"{_INFO} WHERE substr(s.id, 1, ?) = ? {_NEWEST_FIRST} LIMIT 4"
            found = self._read(start, len(name), name.lower(), latest_time())
        if len(found) == 1 or (found and found[0]["id"] == name.lower()):
            return info_of(found[0])
        if found:
            ids = ", ".join(row["id"] for row in found)
            raise SessionError(f"several sessions start with {name!r} ({ids}); give more of the id")
        if name == "last":
            raise SessionError("no session is saved yet; start one with `streamchat`")
        raise _missing(name)

    @reads_rows
    def _info(self, session: str) -> SessionInfo:
        for row in self._read(f"{_INFO} WHERE s.id = ?", session):
            return info_of(row)
        raise _missing(session)

    @reads_rows
    def sessions_with_message(self, text: str, limit: int) -> list[str]:
        """Return the ids of sessions with this user message, but for white space at its ends, newest first."""
        space = " \t\r\n"
        rows = self._read(
            "SELECT DISTINCT s.id, s.updated FROM messages m JOIN turns t ON t.id = m.turn "
            "JOIN sessions s ON s.id = t.session WHERE m.role = 'user' AND t.state != 'undone' "
            f"AND trim(m.text, ?) = ? {_NEWEST_FIRST} LIMIT ?",
            space,
            clean(text).strip(space),
            latest_time(),
            limit,
        )
        return [row["id"] for row in rows]

    def session_after(self, scope: str, system: str, message: str, reply: str) -> str | None:
        """Return a session of another replica of a server with this exchange among its newest ones; here, None."""
        return None

    @reads_rows
    def load(self, session: str) -> StoredSession:
        """Load a whole session; its `damage` names the damaged parts.

        Raises:
            SessionError: No session has this id.
        """
        with self._open.read() as connection:
            row = connection.execute(f"{_INFO} WHERE s.id = ?", (session,)).fetchone()
            turns = connection.execute(
                "SELECT t.*, u.text AS said, a.text AS reply FROM turns t "
                "LEFT JOIN messages u ON u.turn = t.id AND u.role = 'user' "
                "LEFT JOIN messages a ON a.turn = t.id AND a.role = 'assistant' "
                "WHERE t.session = ? AND t.state != 'undone' ORDER BY t.number",
                (session,),
            ).fetchall()
            evictions = connection.execute(
                "SELECT * FROM evictions WHERE session = ? ORDER BY id", (session,)
            ).fetchall()
        if row is None:
            raise _missing(session)
        return session_of(row, turns, evictions)

    @reads_rows
    def marks(self, session: str, first: int, last: int) -> dict[int, CacheMark]:
        """Return the bookkeeping of the cache before each of these turns, as far as it is known."""
        rows = self._read(
            "SELECT number, first, before FROM turns "
            "WHERE session = ? AND number BETWEEN ? AND ? AND state != 'undone'",
            session,
            first,
            last,
        )
        marks = {row["number"]: mark_of(row["before"], row["first"], "", []) for row in rows}
        return {number: mark for number, mark in marks.items() if mark.held}

    @reads_rows
    def live(self, session: str) -> tuple[float, dict[str, Any]] | None:
        """Return the time of the latest live figures and the figures; None if there are none yet."""
        for row in self._read("SELECT at, sample FROM live WHERE session = ?", session):
            if (sample := figures_of(row["sample"])) is not None:
                return moment(row["at"]), sample
        return None

    @reads_rows
    def stats(self, session: str, after: int = 0) -> list[dict[str, Any]]:
        """Return the figures of all finished turns after turn `after`, in order."""
        rows = self._read(
            "SELECT stats FROM turns WHERE session = ? AND state = 'done' AND number > ? AND stats IS NOT NULL "
            "ORDER BY number",
            session,
            after,
        )
        return [figures for row in rows if (figures := figures_of(row["stats"])) is not None]

    @reads_rows
    def search(self, words: str, *, limit: int = 50, here: str | None = None) -> list[SearchHit]:
        """Return messages of all sessions that have all `words`: best first; substrings alone: newest first.

        A message that several forks share is returned once: that of the session `here`, if it has the message.
        """
        query = query_of(clean(words))
        if not query:
            return []
        condition, values = query.where()
        shown = "snippet(words, 0, '', '', '…', 24)" if query.match else "NULL"
        rank = "bm25(words), " if query.match else ""
        rows = self._read(
            f"SELECT s.id AS session, s.title, t.number, t.started, t.state, m.role, m.text, {shown} AS excerpt "
            f"FROM messages m {_INDEX if query.match else ''} JOIN turns t ON t.id = m.turn "
            f"JOIN sessions s ON s.id = t.session WHERE {condition} ORDER BY {rank}t.started DESC LIMIT ?",
            *values,
            SHARED * limit,
        )
        found = [
            SearchHit(
                row["session"],
                row["title"],
                row["number"],
                row["role"],
                row["started"],
                " ".join(row["excerpt"].split()) if query.match else excerpt(row["text"], query.substrings[0]),
                row["text"],
                row["state"] == "undone",
            )
            for row in rows
        ]
        return without_copies(found, here)[:limit]


def _missing(name: str) -> MissingSessionError:
    return MissingSessionError(f"no saved session has the id {name!r}; `streamchat sessions` lists them")
