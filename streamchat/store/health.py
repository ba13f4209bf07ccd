"""What is wrong with a database, as far as SQLite can tell, and repairing what is made from its tables."""

from __future__ import annotations

import sqlite3

MANY = 5
"""Problems that are named; a damaged file has thousands."""


def full_text_indexes(connection: sqlite3.Connection) -> list[str]:
    """Names of the full-text indexes."""
    rows = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND sql LIKE 'CREATE VIRTUAL TABLE%USING fts5%'"
    )
    return [row[0] for row in rows.fetchall()]


def problems_of(connection: sqlite3.Connection) -> list[str]:
    """Each thing that is wrong with the file; reads all of it.

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
        if isinstance(error, sqlite3.OperationalError):  # not of the file: busy, a full disk
            raise
        found = [str(error)]
    return [problem for problem in found if problem != "ok"]


def _index_problems(connection: sqlite3.Connection, index: str) -> list[str]:
    try:
        connection.execute(f"INSERT INTO {index} ({index}, rank) VALUES ('integrity-check', 1)")
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return [f"the search index {index!r} does not fit the messages ({error})"]
    return []


def rebuild_indexes(connection: sqlite3.Connection) -> None:
    """Make all indexes again from the tables.

    Args:
        connection: Inside a transaction.
    """
    connection.execute("REINDEX")
    for index in full_text_indexes(connection):
        connection.execute(f"INSERT INTO {index} ({index}) VALUES ('rebuild')")
