"""Schema and migrations. Append to `MIGRATIONS`; never change an existing one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from streamchat.base.errors import StoreError
from streamchat.store.failures import SQLITE_ERRORS, damage_advice

_FIRST = """
CREATE TABLE sessions (
    id            TEXT PRIMARY KEY,
    title         TEXT NOT NULL,
    created       REAL NOT NULL,              -- seconds since 1970, as all times here
    updated       REAL NOT NULL,
    model         TEXT NOT NULL,              -- as --model takes it
    model_name    TEXT NOT NULL,
    dtype         TEXT NOT NULL,
    fingerprint   TEXT NOT NULL,              -- of configuration and weights
    tokenizer     TEXT NOT NULL,              -- fingerprint of tokenizer and chat format
    settings      TEXT NOT NULL,              -- JSON object
    system_ids    BLOB NOT NULL,              -- ids before the first turn; little-endian int32, as all ids here
    held          TEXT NOT NULL DEFAULT '[]', -- JSON: runs [first, stop) of token log indices that the cache holds
    pins          TEXT NOT NULL DEFAULT '[]', -- JSON: runs that never leave
    compressions  INTEGER NOT NULL DEFAULT 0,
    opened_by     INTEGER                     -- process that has it open; left behind where that was killed
) STRICT;

CREATE TABLE turns (
    id            INTEGER PRIMARY KEY,
    session       TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    number        INTEGER NOT NULL,
    state         TEXT NOT NULL CHECK (state IN ('running', 'done', 'undone')),
    started       REAL NOT NULL,
    finished      REAL,
    first         INTEGER NOT NULL,           -- token log indices, see TurnRecord
    content       INTEGER NOT NULL,
    reply_first   INTEGER NOT NULL,
    ids           BLOB NOT NULL,
    before        TEXT NOT NULL DEFAULT '{}', -- JSON: the cache before the turn, for undo
    stats         TEXT,                       -- JSON object of a --stats-json line
    finish_reason TEXT
) STRICT;
CREATE UNIQUE INDEX turns_by_number ON turns (session, number) WHERE state != 'undone';

CREATE TABLE messages (
    id            INTEGER PRIMARY KEY,
    turn          INTEGER NOT NULL REFERENCES turns (id) ON DELETE CASCADE,
    role          TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
    text          TEXT NOT NULL,
    UNIQUE (turn, role)
) STRICT;

CREATE TABLE evictions (
    id            INTEGER PRIMARY KEY,
    session       TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    turn          INTEGER NOT NULL,           -- number of the turn that made it necessary
    at            REAL NOT NULL,
    cause         TEXT NOT NULL,              -- between_turns, prefill, decode
    runs          TEXT NOT NULL,              -- JSON: runs that left
    length_before INTEGER NOT NULL,
    length_after  INTEGER NOT NULL
) STRICT;
CREATE INDEX evictions_by_session ON evictions (session, turn);

CREATE TABLE changes (
    id            INTEGER PRIMARY KEY,
    session       TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    at            REAL NOT NULL,
    name          TEXT NOT NULL,              -- of a setting
    value         TEXT NOT NULL               -- JSON
) STRICT;

CREATE VIRTUAL TABLE words USING fts5 (
    text, content = 'messages', content_rowid = 'id', tokenize = "unicode61 remove_diacritics 2"
);
CREATE TRIGGER messages_added AFTER INSERT ON messages BEGIN
    INSERT INTO words (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER messages_gone AFTER DELETE ON messages BEGIN
    INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text);
END;
CREATE TRIGGER messages_changed AFTER UPDATE OF text ON messages BEGIN
    INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text);
    INSERT INTO words (rowid, text) VALUES (new.id, new.text);
END;
"""

_LIVE = """
CREATE TABLE live (
    session       TEXT PRIMARY KEY REFERENCES sessions (id) ON DELETE CASCADE,
    at            REAL NOT NULL,
    sample        TEXT NOT NULL               -- JSON: figures of the moment, for `streamchat monitor`
) STRICT;
"""

_EVICTED = """
CREATE TABLE evicted (
    id            INTEGER PRIMARY KEY,
    session       TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    turn          INTEGER NOT NULL,           -- number of the turn that evicted the tokens
    at            REAL NOT NULL,
    runs          TEXT NOT NULL,              -- JSON: runs [first, stop) of their token log indices
    ids_checksum  TEXT NOT NULL,
    fingerprint   TEXT NOT NULL,              -- of the model
    dtype         TEXT NOT NULL,              -- of the cache
    kind          TEXT NOT NULL,              -- native, int8
    position      INTEGER NOT NULL,           -- absolute position of the first token
    file          INTEGER NOT NULL,           -- number of the file with their keys and values
    start         INTEGER NOT NULL,
    length        INTEGER NOT NULL,
    checksum      TEXT NOT NULL
) STRICT;
CREATE INDEX evicted_by_session ON evicted (session, turn);
"""

_FORKS = """
ALTER TABLE sessions ADD COLUMN parent TEXT;          -- the session that it was forked from
ALTER TABLE sessions ADD COLUMN parent_turn INTEGER;  -- the last turn of that session that it has
CREATE INDEX sessions_by_parent ON sessions (parent);
ALTER TABLE evicted ADD COLUMN owner TEXT NOT NULL DEFAULT '';            -- session whose file it is in; '' for its own
ALTER TABLE evicted ADD COLUMN part TEXT NOT NULL DEFAULT 'evicted';      -- evicted, moved, rebased
ALTER TABLE evicted ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;     -- of the cache; 0 if it is not known
ALTER TABLE evicted ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
UPDATE evicted SET owner = session;
CREATE INDEX evicted_by_file ON evicted (owner, file);
"""

MIGRATIONS = (_FIRST, _LIVE, _EVICTED, _FORKS)
"""Script i takes a database from version i to i + 1 (`PRAGMA user_version`)."""


def migrate(
    connection: sqlite3.Connection, path: Path, before: Callable[[Path, int], None] = lambda path, version: None
) -> None:
    """Migrate the database to the newest version, each step in its own transaction.

    Args:
        connection: In autocommit mode.
        path: The file.
        before: Called with the file and its version before the first migration, to back it up.

    Raises:
        StoreError: The database was written by a newer program, or is damaged.
    """
    found = None
    while True:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == len(MIGRATIONS):
            return
        if version < 0:
            raise StoreError(f"{path} cannot be used: its tables have version {version}; {damage_advice(path)}")
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{path} was written by a newer streamchat (version {version} of its tables; this one knows "
                f"{len(MIGRATIONS)}); update streamchat, or move the file aside to start a new one"
            )
        if found is None and version:
            before(path, version)
        found = version
        # `executescript` first commits an open transaction, so the script has its own. IMMEDIATE: if two programs start
        # at once, the second one waits, and its step then fails because the tables exist.
        # A new database gets all tables in one step, so no reader sees it half made.
        stop = version + 1 if version else len(MIGRATIONS)
        steps = "\n".join(MIGRATIONS[version:stop])
        step = f"BEGIN IMMEDIATE;\n{steps}\nPRAGMA user_version = {stop};\nCOMMIT;"
        try:
            connection.executescript(step)
        except SQLITE_ERRORS:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if connection.execute("PRAGMA user_version").fetchone()[0] == version:
                raise
