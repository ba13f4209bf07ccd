"""The database file: arbitrary bytes are changed, and arbitrary columns set to arbitrary values."""

from __future__ import annotations

import shutil
import sqlite3
import time
from array import array
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from streamchat.sessions.transcripts.export import export
from streamchat.store.health import examine
from streamchat.store.records import CacheMark, ModelIdentity, NewSession, StoredTurn
from streamchat.store.store import Store
from tools.fuzz.target import Target

BYTES, COLUMN, WHOLE = b"B", b"C", b"W"
"""First byte of an input: changes of single bytes, of one column with SQL's own checks, or the whole file."""
COLUMNS = (
    *(f"sessions.{name}" for name in ("settings", "held", "pins", "title", "created", "model_name", "system_ids")),
    *(f"turns.{name}" for name in ("number", "state", "started", "ids", "before", "stats", "finish_reason")),
    *(f"messages.{name}" for name in ("text", "role")),
    *(f"evictions.{name}" for name in ("runs", "turn", "at", "cause")),
)


def run(data: bytes) -> None:
    """Run everything that reads a conversation."""
    path = Path("store", "streamchat.db")
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir(mode=0o700)
    path.write_bytes(_file(data))
    if data[:1] == COLUMN:
        _set_column(path, data)
    with Store(path) as store:
        for info in store.sessions():
            session = store.load(info.id)
            for kind in ("markdown", "jsonl", "html"):
                assert export(session, kind)
            store.stats(info.id)
            store.live(info.id)
        store.search("sea")
    examine(path)


def _file(data: bytes) -> bytes:
    if data[:1] == WHOLE:
        return data[1:]
    content = bytearray(database())
    if data[:1] == BYTES:
        for place, value in _changes(data[1:]):
            content[place % len(content)] = value
    return bytes(content)


def _changes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (offset, byte) changes: three bytes of the input for the offset, one for the byte."""
    for at in range(0, len(data) - 3, 4):
        yield int.from_bytes(data[at : at + 3], "big"), data[at + 3]


def _set_column(path: Path, data: bytes) -> None:
    table, name = COLUMNS[data[1] % len(COLUMNS)].split(".") if len(data) > 1 else ("sessions", "title")
    kind, raw = data[2:3], data[3:]
    value: bytes | str | int | float = raw
    if kind == b"t":
        value = raw.decode("utf-8", "replace")
    elif kind == b"i":
        value = int.from_bytes(raw[:8], "big", signed=True)
    elif kind == b"f":
        value = int.from_bytes(raw[:4], "big", signed=True) / 3
    connection = sqlite3.connect(path)
    try:
        with connection:
            connection.execute(f"UPDATE {table} SET {name} = ?", (value,))
    except sqlite3.Error:  # the database refuses it
        pass
    finally:
        connection.close()


@cache
def database() -> bytes:
    """Return a database file with one session. It is made once, because its migrations are slow."""
    path = Path("made", "streamchat.db")
    mark = CacheMark(((0, 4),), ((0, 1),), (0,), 0)
    now = time.time()
    turns = tuple(
        StoredTurn(
            number, text, "of the <b>sea</b>", 6 * number - 6, 6 * number - 5, 6 * number - 3,
            array("i", range(6)), mark, started=now, finished=now, stats={"new_tokens": 3}, finish_reason="stop",
        )
        for number, text in enumerate(("tell me", "and then?"), 1)
    )  # fmt: skip
    with Store(path) as store:
        store.add([NewSession("a title", ModelIdentity("default", "tiny"), {"cache_size": 64}, turns)])
    content = path.read_bytes()
    shutil.rmtree(path.parent)
    return content


def seeds() -> dict[str, bytes]:
    """The file as it is, changed bytes, columns of several types, and no database."""
    return {
        "unchanged": BYTES,
        "header": BYTES + b"\0\0\x12\xff" + b"\0\0\x3c\1",
        "text": COLUMN + b"\0t" + b'{"cache_size": "x"}',
        "blob": COLUMN + b"\x0a" + b"b" + b"\1\2\3",
        "number": COLUMN + b"\x07" + b"i" + b"\0" * 7 + b"\3",
        "runs": COLUMN + b"\x0b" + b"t" + b'{"held": [[0, 3]], "pins": [], "turn_starts": [0], "compressions": 0}',
        "other": WHOLE + b"SQLite format 3\0",
    }


TARGET = Target(
    "database",
    run,
    seeds,
    ("streamchat.store", "streamchat.sessions.transcripts"),
    words=(b'{"held": [[0, 3]]}', b"[[0, 3]]", b"null", b"[" * 200, b"CREATE", b"\0\0\0\0", b"\xff" * 4),
    max_bytes=512,
    suite_runs=25,
)
