"""Finds what is wrong with a database, as far as SQLite can tell, and rebuilds its indexes."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from streamchat.store.connection import connect, transaction
from streamchat.store.failures import is_damage, sentences

MANY = 5
"""Problems that are named; a damaged file has thousands."""


def full_text_indexes(connection: sqlite3.Connection) -> list[str]:
    """Names of the full-text indexes."""
    rows = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND sql LIKE 'CREATE VIRTUAL TABLE%USING fts5%'"
    )
    return [row[0] for row in rows.fetchall()]


def problems_of(connection: sqlite3.Connection) -> list[str]:
    """Return each fault of the file; reads all of it.

    Args:
        connection: Outside of a transaction.
    """
    try:
        found = [row[0] for row in connection.execute(f"PRAGMA integrity_check({MANY})").fetchall()]
        lost = connection.execute("PRAGMA foreign_key_check").fetchmany(MANY)
        found += [f"a row of {row[0]} refers to nothing" for row in lost]
        for index in full_text_indexes(connection):
            found += _index_problems(connection, index)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):  # not of the file: busy, a full disk
            raise
        found = [str(error)]
    return [problem for problem in found if problem != "ok"]


def _index_problems(connection: sqlite3.Connection, index: str) -> list[str]:
    try:
        connection.execute(f"INSERT INTO {index} ({index}, rank) VALUES ('integrity-check', 1)")
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return [f"the search index {index!r} does not fit the messages ({error})"]
    return []


@dataclass(frozen=True)
class Findings:
    """What `look_at` found."""

    problems: list[str]
    sessions: int = 0
    turns: int = 0


def look_at(path: Path) -> Findings:
    """Examine the database at `path`, of any version; reads all of it.

    Raises:
        StoreError: It cannot be read at all.
    """
    with sentences(path), closing(connect(path)) as connection:
        problems = problems_of(connection)
        try:
            counts = connection.execute(
                "SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM turns)"
            ).fetchone()
        except sqlite3.DatabaseError as error:
            return Findings(problems or [str(error)])
        return Findings(problems, counts[0], counts[1])


def is_repairable(problems: list[str]) -> bool:
    """Return whether only indexes are wrong, which can be rebuilt without a loss."""
    ours = ("row ", "wrong # of entries in index", "non-unique entry in index", "the search index")
    return all(each.startswith(ours) and ("index" in each) for each in problems)


def repair(connection: sqlite3.Connection) -> list[str]:
    """Rebuild all indexes; return the faults that are left.

    Args:
        connection: Outside of a transaction.
    """
    with transaction(connection):
        rebuild_indexes(connection)
    return problems_of(connection)


def rebuild_indexes(connection: sqlite3.Connection) -> None:
    """Rebuild all indexes from the tables.

    Args:
        connection: Inside a transaction.
    """
    connection.execute("REINDEX")
    for index in full_text_indexes(connection):
        connection.execute(f"INSERT INTO {index} ({index}) VALUES ('rebuild')")
