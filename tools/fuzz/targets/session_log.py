"""The log of a session in a shared folder: lines of arbitrary JSON with valid checksums, and arbitrary bytes."""

from __future__ import annotations

import zlib
from array import array

from streamchat.base.errors import StoreError
from streamchat.store.records import CacheMark, SessionInfo, StoredEviction, StoredTurn
from streamchat.store.shared.log import line_of, read_log
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Read the input as a log, and as the texts of its lines; write what was read, and read it again."""
    read_log(data)
    found = read_log(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in data.split(b"\n")))
    if found is not None:
        assert read_log(line_of(found.info, found.system_ids, 1, found.turns, found.evictions)) == found


def seeds() -> dict[str, bytes]:
    """A session of two lines."""
    info = SessionInfo("abc234", "title", 1.0, 2.0, "m", "M", "float32", "f", "t", {"seed": 1}, ((0, 4),), ((0, 2),))
    turns = [
        StoredTurn(i, "hi", "ho", 4 * i, 4 * i, 4 * i + 2, array("i", [1, 2]), CacheMark(((0, 4),))) for i in (1, 2)
    ]
    evictions = [StoredEviction(1, 1.0, "prefill", ((1, 2),), 9, 8)]
    first = line_of(info, array("i", [7]), 1, turns[:1], evictions)
    second = line_of(info, None, 2, turns[1:], [])
    return {"whole": first + second, "texts": first[9:] + second[9:-1], "one": first[9:-1]}


TARGET = Target(
    "session_log",
    run,
    seeds,
    ("streamchat.store.shared.log",),
    (StoreError,),
    (b'"first"', b'"turns"', b'"ids"', b"null", b"[[0,4]]", b"\n", b"1e400"),
    suite_runs=300,
)
