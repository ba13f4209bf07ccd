"""Writes sessions and turns into the tables, inside the caller's transaction."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import asdict

from streamchat.store.records import (
    CacheMark,
    ModelIdentity,
    NewSession,
    StoredEviction,
    StoredSession,
    StoredTurn,
    clean,
    pack_ids,
)

ID_LENGTH = 6
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that look alike


def random_id() -> str:
    """Return a random id of a session."""
    return "".join(secrets.choice(_LETTERS) for _ in range(ID_LENGTH))


def new_id(connection: sqlite3.Connection) -> str:
    """Return an id that no session has."""
    while True:
        session = random_id()
        if not connection.execute("SELECT 1 FROM sessions WHERE id = ?", (session,)).fetchone():
            return session


def insert_session(
    connection: sqlite3.Connection, new: NewSession, system_ids: Iterable[int] = (), session: str | None = None
) -> str:
    """Insert a session with its turns; return its id: `session`, or a new one."""
    session, now, identity = session or new_id(connection), time.time(), new.identity
    names = (clean(identity.model), clean(identity.model_name))
    prints = (identity.dtype, identity.fingerprint, identity.tokenizer)
    connection.execute(
        "INSERT INTO sessions (id, title, created, updated, model, model_name, dtype, fingerprint, tokenizer, "
        "settings, system_ids) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (session, clean(new.title), now, now, *names, *prints, json.dumps(dict(new.settings)), pack_ids(system_ids)),
    )
    for turn in new.turns:
        write_turn(connection, session, turn)
    return session


def replace_session(connection: sqlite3.Connection, stored: StoredSession) -> None:
    """Write a whole session in place of the one with its id, if there is one."""
    info = stored.info
    connection.execute("DELETE FROM sessions WHERE id = ?", (info.id,))
    identity = ModelIdentity(info.model, info.model_name, info.dtype, info.fingerprint, info.tokenizer)
    new = NewSession(info.title, identity, info.settings, stored.turns)
    insert_session(connection, new, stored.system_ids, info.id)
    insert_evictions(connection, info.id, stored.evictions)
    connection.execute(
        "UPDATE sessions SET created = ?, updated = ?, held = ?, pins = ?, compressions = ? WHERE id = ?",
        (info.created, info.updated, json.dumps(info.held), json.dumps(info.pins), info.compressions, info.id),
    )


def insert_evictions(connection: sqlite3.Connection, session: str, evictions: Iterable[StoredEviction]) -> None:
    """Insert evictions of a session."""
    connection.executemany(
        "INSERT INTO evictions (session, turn, at, cause, runs, length_before, length_after) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(session, e.turn, e.at, e.cause, json.dumps(e.runs), e.length_before, e.length_after) for e in evictions],
    )


def write_turn(connection: sqlite3.Connection, session: str, turn: StoredTurn, *, is_reencoded: bool = False) -> None:
    """Insert a turn, or update the stored one.

    Args:
        connection: Inside a transaction.
        session: Session id.
        turn: An existing row keeps its values for those that are None.
        is_reencoded: Its ids are new ids of another model, so what was stored about the cache before it is invalid.
    """
    stats = None if turn.stats is None else json.dumps(dict(turn.stats))
    values: tuple[object, ...] = (turn.state, turn.start, turn.message_start, turn.reply_start, pack_ids(turn.ids))
    values += (turn.finished, turn.finish_reason, stats)
    known = connection.execute(
        "SELECT id FROM turns WHERE session = ? AND number = ? AND state != 'undone'", (session, turn.number)
    ).fetchone()
    if known is None:
        row = connection.execute(
            "INSERT INTO turns (state, first, content, reply_first, ids, finished, finish_reason, stats, session, "
            "number, started, before) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, session, turn.number, turn.started, json.dumps(asdict(turn.before))),
        ).lastrowid
    else:
        row = known["id"]
        connection.execute(
            "UPDATE turns SET state = ?, first = ?, content = ?, reply_first = ?, ids = ?, finished = "
            "coalesce(?, finished), finish_reason = coalesce(?, finish_reason), stats = coalesce(?, stats) "
            "WHERE id = ?",
            (*values, row),
        )
        if is_reencoded or turn.before != CacheMark():
            connection.execute("UPDATE turns SET before = ? WHERE id = ?", (json.dumps(asdict(turn.before)), row))
    for role, text in (("user", turn.text), ("assistant", turn.reply)):
        if not text and role == "assistant":  # not started, or cut off within its first character
            connection.execute("DELETE FROM messages WHERE turn = ? AND role = ?", (row, role))
        else:
            connection.execute(
                "INSERT INTO messages (turn, role, text) VALUES (?, ?, ?) "
                "ON CONFLICT (turn, role) DO UPDATE SET text = excluded.text WHERE text != excluded.text",
                (row, role, clean(text)),
            )


def repair_session(connection: sqlite3.Connection, stored: StoredSession) -> None:
    """Write back what could be read of a damaged session. Resuming writes its ids and cache state."""
    session = stored.info.id
    settings = json.dumps(dict(stored.info.settings))
    connection.execute("UPDATE sessions SET settings = ? WHERE id = ?", (settings, session))
    if not stored.info.tokenizer:
        _renumber_turns(connection, session)
    lost = [(session, turn.number) for turn in stored.turns if turn.stats is None]
    connection.executemany("UPDATE turns SET stats = NULL WHERE session = ? AND number = ? AND state != 'undone'", lost)


def _renumber_turns(connection: sqlite3.Connection, session: str) -> None:
    """Number the turns of a damaged session from 1, as `session_of` does, and drop what refers to old numbers.

    A turn without any message is marked as undone.
    """
    connection.execute("DELETE FROM evictions WHERE session = ?", (session,))
    rows = connection.execute(
        "SELECT t.id, EXISTS (SELECT 1 FROM messages m WHERE m.turn = t.id) AS said FROM turns t "
        "WHERE t.session = ? AND t.state != 'undone' ORDER BY t.number",
        (session,),
    ).fetchall()
    kept = [row["id"] for row in rows if row["said"]]
    lost = [(row["id"],) for row in rows if not row["said"]]
    connection.executemany("UPDATE turns SET state = 'undone' WHERE id = ?", lost)
    # via unused numbers, because turn numbers must be unique at every step
    lowest = connection.execute("SELECT min(number) FROM turns WHERE session = ?", (session,)).fetchone()[0] or 0
    free = [(min(lowest, 0) - i, row) for i, row in enumerate(kept, 1)]
    connection.executemany("UPDATE turns SET number = ? WHERE id = ?", free)
    numbers = [(i, row) for i, row in enumerate(kept, 1)]
    connection.executemany("UPDATE turns SET number = ?, before = '{}', state = 'done' WHERE id = ?", numbers)
