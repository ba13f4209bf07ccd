"""Copies the rows of a session for a fork. The pages of its archive are shared: only their rows are copied."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass

from streamchat.store.records import CacheMark
from streamchat.store.writing import new_id

_COPIED = "model, model_name, dtype, fingerprint, tokenizer, settings, system_ids"
_TURN = "number, state, started, finished, first, content, reply_first, ids, before, stats, finish_reason"
_EVICTION = "turn, at, cause, runs, length_before, length_after"
_PAGE = "turn, at, runs, ids_checksum, fingerprint, dtype, kind, position, part, generation, epoch, file, start, length"


@dataclass(frozen=True)
class Fork:
    """A session to create as a fork of another one."""

    parent: str
    at: int
    """The last turn that both share."""
    turns: int
    """Number of turns that the fork has; more than `at` if it keeps turns that its parent gives up."""
    cache: CacheMark
    """Its cache, after those turns."""


def insert_fork(connection: sqlite3.Connection, fork: Fork) -> str:
    """Insert a fork with its turns, inside the caller's transaction; return its new id.

    Rows of the archive are copied for the tokens that its turns evicted. They refer to the files of the session that
    wrote them.
    """
    session, now, given = new_id(connection), time.time(), (fork.parent, fork.turns)
    mark = (json.dumps(fork.cache.held), json.dumps(fork.cache.pins), fork.cache.compressions)
    connection.execute(
        f"INSERT INTO sessions (id, title, created, updated, parent, parent_turn, held, pins, compressions, {_COPIED}) "
        f"SELECT ?, title, ?, ?, id, ?, ?, ?, ?, {_COPIED} FROM sessions WHERE id = ?",
        (session, now, now, fork.at, *mark, fork.parent),
    )
    connection.execute(
        f"INSERT INTO turns (session, {_TURN}) SELECT ?, {_TURN} FROM turns "
        "WHERE session = ? AND number <= ? AND state != 'undone'",
        (session, *given),
    )
    connection.execute(
        "INSERT INTO messages (turn, role, text) SELECT own.id, m.role, m.text FROM turns own "
        "JOIN turns t ON t.session = ? AND t.number = own.number AND t.state != 'undone' "
        "JOIN messages m ON m.turn = t.id WHERE own.session = ? ORDER BY own.number, m.id",
        (fork.parent, session),
    )
    connection.execute(
        f"INSERT INTO evictions (session, {_EVICTION}) SELECT ?, {_EVICTION} FROM evictions "
        "WHERE session = ? AND turn <= ? ORDER BY id",
        (session, *given),
    )
    connection.execute(
        f"INSERT INTO evicted (session, owner, checksum, {_PAGE}) "
        f"SELECT ?, CASE owner WHEN '' THEN session ELSE owner END, checksum, {_PAGE} FROM evicted "
        "WHERE session = ? AND turn <= ? ORDER BY id",
        (session, *given),
    )
    return session


def adopt_children(connection: sqlite3.Connection, session: str) -> None:
    """Make the forks of a session, which is about to be deleted, forks of its own parent."""
    connection.execute(
        "UPDATE sessions SET parent_turn = min(parent_turn, (SELECT parent_turn FROM sessions WHERE id = ?)), "
        "parent = (SELECT parent FROM sessions WHERE id = ?) WHERE parent = ?",
        (session, session, session),
    )
