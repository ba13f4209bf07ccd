"""Reading and writing sessions. One `Store` belongs to one thread at a time; opening another one is cheap."""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from streamchat.errors import SessionError
from streamchat.store.database import connect, database_path, sentences, transaction
from streamchat.store.records import (
    CacheMark,
    Described,
    Found,
    Run,
    SessionInfo,
    StoredEviction,
    StoredSession,
    StoredTurn,
    clean,
    packed,
    unpacked,
)
from streamchat.store.search import query_of

ID_LENGTH = 6
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that look alike
_INFO = """
    SELECT s.*, (SELECT count(*) FROM turns t WHERE t.session = s.id AND t.state != 'undone') AS count
    FROM sessions s
"""


class Store:
    """The database of saved conversations. A context manager that closes it.

    Args:
        path: The file; the user's own by default.

    Raises:
        StoreError: It cannot be opened. Every other method raises it as well when the file fails later.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or database_path()
        self._connection = connect(self.path)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing is pending."""
        self._connection.close()

    def snapshot_path(self, session: str) -> Path:
        """Where the snapshot of a session's cache is, or would be."""
        return self.path.parent / "snapshots" / f"{session}.safetensors"

    @property
    def lock_folder(self) -> Path:
        """Where the locks of open sessions are."""
        return self.path.parent / "locks"

    # --- writing ------------------------------------------------------------------------------------------------

    def create(
        self,
        title: str,
        *,
        model: str,
        model_name: str,
        dtype: str,
        fingerprint: str,
        tokenizer: str,
        settings: Mapping[str, Any],
        system_ids: Iterable[int],
    ) -> str:
        """Begin a session; returns its new id."""
        now, as_json, system = time.time(), json.dumps(dict(settings)), packed(system_ids)
        with sentences(self.path), transaction(self._connection):
            while True:
                new = "".join(secrets.choice(_LETTERS) for _ in range(ID_LENGTH))
                if not self._connection.execute("SELECT 1 FROM sessions WHERE id = ?", (new,)).fetchone():
                    break
            self._connection.execute(
                "INSERT INTO sessions (id, title, created, updated, model, model_name, dtype, fingerprint, tokenizer, "
                "settings, system_ids) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    new,
                    clean(title),
                    now,
                    now,
                    clean(model),
                    clean(model_name),
                    dtype,
                    fingerprint,
                    tokenizer,
                    as_json,
                    system,
                ),
            )
        return new

    def write(
        self,
        session: str,
        *,
        turns: Sequence[StoredTurn] = (),
        cache: CacheMark | None = None,
        evictions: Sequence[StoredEviction] = (),
        undone_from: int | None = None,
        described: Described | None = None,
    ) -> None:
        """Write what happened, all or nothing.

        Args:
            session: Its id.
            turns: New ones, and ones that have grown.
            cache: What the cache holds now.
            evictions: Since the last call.
            undone_from: Turns from this number on were taken back before all of this; they stay to be found by words.
            described: The model that it goes on with.
        """
        with sentences(self.path), transaction(self._connection):
            if described is not None:
                self._connection.execute(
                    "UPDATE sessions SET dtype = ?, fingerprint = ?, tokenizer = ?, system_ids = ? WHERE id = ?",
                    (
                        described.dtype,
                        described.fingerprint,
                        described.tokenizer,
                        packed(described.system_ids),
                        session,
                    ),
                )
            if undone_from is not None:
                self._connection.execute(
                    "UPDATE turns SET state = 'undone' WHERE session = ? AND number >= ? AND state != 'undone'",
                    (session, undone_from),
                )
                self._connection.execute(
                    "DELETE FROM evictions WHERE session = ? AND turn >= ?", (session, undone_from)
                )
            for turn in turns:
                self._write_turn(session, turn)
            self._connection.executemany(
                "INSERT INTO evictions (session, turn, at, cause, runs, length_before, length_after) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (session, e.turn, e.at, e.cause, json.dumps(e.runs), e.length_before, e.length_after)
                    for e in evictions
                ],
            )
            if cache is not None:
                self._connection.execute(
                    "UPDATE sessions SET held = ?, pins = ?, compressions = ? WHERE id = ?",
                    (json.dumps(cache.held), json.dumps(cache.pins), cache.compressions, session),
                )
            self._connection.execute("UPDATE sessions SET updated = ? WHERE id = ?", (time.time(), session))

    def _write_turn(self, session: str, turn: StoredTurn) -> None:
        stats = None if turn.stats is None else json.dumps(dict(turn.stats))
        values = (turn.state, turn.first, turn.content, turn.reply_first, packed(turn.ids))
        values += (turn.finished, turn.finish_reason, stats)  # type: ignore[assignment]
        known = self._connection.execute(
            "SELECT id FROM turns WHERE session = ? AND number = ? AND state != 'undone'", (session, turn.number)
        ).fetchone()
        if known is None:
            row = self._connection.execute(
                "INSERT INTO turns (state, first, content, reply_first, ids, finished, finish_reason, stats, session, "
                "number, started, before) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, session, turn.number, turn.started, json.dumps(asdict(turn.before))),
            ).lastrowid
        else:
            row = known["id"]
            # what is not known any more of a turn long ago stays as it was
            self._connection.execute(
                "UPDATE turns SET state = ?, first = ?, content = ?, reply_first = ?, ids = ?, finished = "
                "coalesce(?, finished), finish_reason = coalesce(?, finish_reason), stats = coalesce(?, stats) "
                "WHERE id = ?",
                (*values, row),
            )
        for role, text in (("user", turn.text), ("assistant", turn.reply)):
            if (
                not text and role == "assistant"
            ):  # not begun; or cut off within its first character, and nothing is left
                self._connection.execute("DELETE FROM messages WHERE turn = ? AND role = ?", (row, role))
            else:
                self._connection.execute(
                    "INSERT INTO messages (turn, role, text) VALUES (?, ?, ?) "
                    "ON CONFLICT (turn, role) DO UPDATE SET text = excluded.text WHERE text != excluded.text",
                    (row, role, clean(text)),
                )

    def change(self, session: str, name: str, value: Any, settings: Mapping[str, Any]) -> None:
        """A setting took another value; `settings` are all that are in force now."""
        with sentences(self.path), transaction(self._connection):
            self._connection.execute(
                "INSERT INTO changes (session, at, name, value) VALUES (?, ?, ?, ?)",
                (session, time.time(), name, json.dumps(value)),
            )
            self._connection.execute(
                "UPDATE sessions SET settings = ? WHERE id = ?", (json.dumps(dict(settings)), session)
            )

    def settle_model(self, session: str, model: str, model_name: str, settings: Mapping[str, Any]) -> None:
        """An imported session was resumed: what it continues with takes the place of what its file named."""
        with sentences(self.path):
            self._connection.execute(
                "UPDATE sessions SET model = ?, model_name = ?, settings = ? WHERE id = ?",
                (clean(model), clean(model_name), json.dumps(dict(settings)), session),
            )

    def mark_open(self, session: str, process: int | None = None) -> None:
        """`process`, this one by default, has it open. The lock decides; this is for the message."""
        with sentences(self.path):
            self._connection.execute(
                "UPDATE sessions SET opened_by = ? WHERE id = ?", (process or os.getpid(), session)
            )

    def mark_closed(self, session: str) -> None:
        """It was left in order."""
        with sentences(self.path):
            self._connection.execute("UPDATE sessions SET opened_by = NULL WHERE id = ?", (session,))

    def write_live(self, session: str, sample: Mapping[str, Any]) -> None:
        """The figures of this moment, in place of those before."""
        with sentences(self.path):
            self._connection.execute(
                "INSERT INTO live (session, at, sample) VALUES (?, ?, ?) "
                "ON CONFLICT (session) DO UPDATE SET at = excluded.at, sample = excluded.sample",
                (session, time.time(), json.dumps(dict(sample))),
            )

    def rename(self, session: str, title: str) -> None:
        """Give it another title."""
        with sentences(self.path):
            self._connection.execute("UPDATE sessions SET title = ? WHERE id = ?", (clean(title), session))

    def delete(self, session: str) -> None:
        """Delete it for good, with the snapshot of its cache."""
        with sentences(self.path):
            self.snapshot_path(session).unlink(missing_ok=True)
            self._connection.execute("DELETE FROM sessions WHERE id = ?", (session,))

    # --- reading ------------------------------------------------------------------------------------------------

    def sessions(self, words: str = "", limit: int | None = None) -> list[SessionInfo]:
        """All sessions, newest first; with `words` those whose title or messages have them all."""
        where, values, words = "", list[str](), clean(words)
        if query := query_of(words):
            where = (
                "WHERE s.title LIKE ? ESCAPE '\\' OR s.id IN (SELECT t.session FROM words JOIN messages m ON m.id = "
                "words.rowid JOIN turns t ON t.id = m.turn WHERE words MATCH ?)"
            )
            escaped = words.strip().replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
            values = [f"%{escaped}%", query]
        with sentences(self.path):
            rows = self._connection.execute(
                f"{_INFO} {where} ORDER BY s.updated DESC LIMIT ?", (*values, -1 if limit is None else limit)
            ).fetchall()
        return [_info(row) for row in rows]

    def find(self, name: str) -> SessionInfo:
        """The session that `name` means: 'last', an id, or the start of one.

        Raises:
            SessionError: There is none, or there are several.
        """
        name = clean(name)
        with sentences(self.path):
            if name == "last":
                found = self._connection.execute(f"{_INFO} ORDER BY s.updated DESC LIMIT 1").fetchall()
            else:
                found = self._connection.execute(
                    f"{_INFO} WHERE substr(s.id, 1, ?) = ? ORDER BY s.updated DESC LIMIT 4", (len(name), name.lower())
                ).fetchall()
        if len(found) == 1 or (found and found[0]["id"] == name.lower()):
            return _info(found[0])
        if found:
            ids = ", ".join(row["id"] for row in found)
            raise SessionError(f"several conversations begin with {name!r} ({ids}); give more of the id")
        if name == "last":
            raise SessionError("no conversation is saved yet; start one with `streamchat`")
        raise SessionError(f"no saved conversation has the id {name!r}; `streamchat sessions` lists them")

    def load(self, session: str) -> StoredSession:
        """All of a session.

        Raises:
            SessionError: There is none of that id.
        """
        with sentences(self.path):
            self._connection.execute("BEGIN")  # one state, though another process writes
            try:
                row = self._connection.execute(f"{_INFO} WHERE s.id = ?", (session,)).fetchone()
                turns = self._connection.execute(
                    "SELECT t.*, u.text AS said, a.text AS reply FROM turns t "
                    "LEFT JOIN messages u ON u.turn = t.id AND u.role = 'user' "
                    "LEFT JOIN messages a ON a.turn = t.id AND a.role = 'assistant' "
                    "WHERE t.session = ? AND t.state != 'undone' ORDER BY t.number",
                    (session,),
                ).fetchall()
                evictions = self._connection.execute(
                    "SELECT * FROM evictions WHERE session = ? ORDER BY id", (session,)
                ).fetchall()
            finally:
                self._connection.execute("COMMIT")
        if row is None:
            raise SessionError(f"no saved conversation has the id {session!r}; `streamchat sessions` lists them")
        return StoredSession(
            _info(row),
            unpacked(row["system_ids"]),
            tuple(_turn(turn) for turn in turns),
            tuple(
                StoredEviction(e["turn"], e["at"], e["cause"], _runs(e["runs"]), e["length_before"], e["length_after"])
                for e in evictions
            ),
        )

    def live(self, session: str) -> tuple[float, dict[str, Any]] | None:
        """When the latest figures were written, and which; None before the first."""
        with sentences(self.path):
            row = self._connection.execute("SELECT at, sample FROM live WHERE session = ?", (session,)).fetchone()
        return None if row is None else (row["at"], json.loads(row["sample"]))

    def stats(self, session: str, after: int = 0) -> list[dict[str, Any]]:
        """The figures of all finished turns behind turn `after`, in order."""
        with sentences(self.path):
            rows = self._connection.execute(
                "SELECT stats FROM turns WHERE session = ? AND state = 'done' AND number > ? AND stats IS NOT NULL "
                "ORDER BY number",
                (session, after),
            ).fetchall()
        return [json.loads(row["stats"]) for row in rows]

    def search(self, words: str, *, limit: int = 50) -> list[Found]:
        """Messages of all sessions that have all `words`, best first."""
        query = query_of(clean(words))
        if not query:
            return []
        with sentences(self.path):
            rows = self._connection.execute(
                "SELECT s.id AS session, s.title, t.number, t.started, t.state, m.role, m.text, "
                "snippet(words, 0, '', '', '…', 24) AS excerpt FROM words "
                "JOIN messages m ON m.id = words.rowid JOIN turns t ON t.id = m.turn "
                "JOIN sessions s ON s.id = t.session WHERE words MATCH ? ORDER BY bm25(words), t.started DESC LIMIT ?",
                (query, limit),
            ).fetchall()
        return [
            Found(
                row["session"],
                row["title"],
                row["number"],
                row["role"],
                row["started"],
                " ".join(row["excerpt"].split()),
                row["text"],
                row["state"] == "undone",
            )
            for row in rows
        ]

    def check(self) -> str:
        """What SQLite finds wrong with the file; '' where all is well."""
        with sentences(self.path):
            problems = [row[0] for row in self._connection.execute("PRAGMA integrity_check")]
            lost = self._connection.execute("PRAGMA foreign_key_check").fetchall()
            problems += [f"a row of {row[0]} refers to nothing" for row in lost]
            try:
                self._connection.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
            except sqlite3.DatabaseError as error:
                problems.append(f"the index of words is wrong ({error})")
        return "; ".join(problem for problem in problems if problem != "ok")


def _runs(text: str) -> tuple[Run, ...]:
    return tuple((int(first), int(stop)) for first, stop in json.loads(text))


def _info(row: sqlite3.Row) -> SessionInfo:
    return SessionInfo(
        id=row["id"],
        title=row["title"],
        created=row["created"],
        updated=row["updated"],
        model=row["model"],
        model_name=row["model_name"],
        dtype=row["dtype"],
        fingerprint=row["fingerprint"],
        tokenizer=row["tokenizer"],
        settings=json.loads(row["settings"]),
        held=_runs(row["held"]),
        pins=_runs(row["pins"]),
        compressions=row["compressions"],
        opened_by=row["opened_by"],
        turns=row["count"],
    )


def _turn(row: sqlite3.Row) -> StoredTurn:
    before = json.loads(row["before"])
    return StoredTurn(
        number=row["number"],
        text=row["said"] or "",
        reply=row["reply"] or "",
        first=row["first"],
        content=row["content"],
        reply_first=row["reply_first"],
        ids=unpacked(row["ids"]),
        before=CacheMark(
            tuple(map(tuple, before.get("held", ()))),
            tuple(map(tuple, before.get("pins", ()))),
            tuple(before.get("turn_starts", ())),
            before.get("compressions", 0),
        ),
        state=row["state"],
        started=row["started"],
        finished=row["finished"],
        stats=json.loads(row["stats"]) if row["stats"] else None,
        finish_reason=row["finish_reason"],
    )
