"""Finds the faults of a database that SQLite can detect, and rebuilds its indexes."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from streamchat.store.connection import connect, transaction
from streamchat.store.failures import SQLITE_ERRORS, as_store_errors, is_damage, text_of

MAX_PROBLEMS = 5
"""Maximum number of problems that are reported; a damaged file has thousands."""


def full_text_indexes(connection: sqlite3.Connection) -> list[str]:
    """Return the names of the full-text indexes."""
    rows = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND sql LIKE 'CREATE VIRTUAL TABLE%USING fts5%'"
    )
    return [row[0] for row in rows.fetchall()]


def problems_of(connection: sqlite3.Connection) -> list[str]:
    """Return the faults of the file; reads all of it.

    Args:
        connection: Outside of a transaction.
    """
    try:
        found = [row[0] for row in connection.execute(f"PRAGMA integrity_check({MAX_PROBLEMS})").fetchall()]
        lost = connection.execute("PRAGMA foreign_key_check").fetchmany(MAX_PROBLEMS)
        found += [f"a row of {row[0]} refers to a missing row" for row in lost]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        found += [f"its tables have version {version}"] if version < 0 else []
        for index in full_text_indexes(connection):
            found += _index_problems(connection, index)
    except SQLITE_ERRORS as error:
        if not is_damage(error):  # not a fault of the file: busy, a full disk
            raise
        found = [text_of(error)]
    return [problem for problem in found if problem != "ok"]


def _index_problems(connection: sqlite3.Connection, index: str) -> list[str]:
    try:
        connection.execute(f"INSERT INTO {index} ({index}, rank) VALUES ('integrity-check', 1)")
    except SQLITE_ERRORS as error:
        if not is_damage(error):
            raise
        return [f"the search index {index!r} does not match the messages ({text_of(error)})"]
    return []


@dataclass(frozen=True)
class HealthReport:
    """The result of `examine`."""

    problems: list[str]
    sessions: int = 0
    turns: int = 0


def examine(path: Path) -> HealthReport:
    """Check the database at `path`, of any version; reads all of it.

    A file without any table is intact and has no sessions: the process that created it was killed before it created the
    tables, and the next `Store` does that.

    Raises:
        StoreError: The file cannot be read at all.
    """
    with as_store_errors(path), closing(connect(path)) as connection:
        problems = problems_of(connection)
        if not problems and _has_no_tables(connection):
            return HealthReport([])
        try:
            counts = connection.execute(
                "SELECT (SELECT count(*) FROM sessions), (SELECT count(*) FROM turns)"
            ).fetchone()
        except SQLITE_ERRORS as error:
            return HealthReport(problems or [text_of(error)])
        return HealthReport(problems, counts[0], counts[1])


def _has_no_tables(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is None


def is_repairable(problems: list[str]) -> bool:
    """Return whether only indexes are damaged, which can be rebuilt without loss."""
    ours = ("row ", "wrong # of entries in index", "non-unique entry in index", "the search index")
    return all(each.startswith(ours) and ("index" in each) for each in problems)


def repair(connection: sqlite3.Connection) -> list[str]:
    """Rebuild all indexes; return the remaining faults.

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
