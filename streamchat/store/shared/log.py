"""The log of a session in a shared folder: lines with checksums, each with what changed up to a finished turn.

The first line of a log has the whole session, so that one log is enough to read it. A last line that was cut off does
not count: it was never confirmed. An owner writes nothing after such a line, so that any other damage is an error.
"""

from __future__ import annotations

import base64
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from streamchat.base.errors import StoreError
from streamchat.store.records import (
    CacheMark,
    SessionInfo,
    StoredEviction,
    StoredSession,
    StoredTurn,
    pack_ids,
    unpack_ids,
)

_LOCAL = ("opened_by", "turns")
"""Fields of `SessionInfo` that are not in the log."""


def line_of(
    info: SessionInfo,
    system_ids: array[int] | None,
    first: int,
    turns: Sequence[StoredTurn],
    evictions: Sequence[StoredEviction],
) -> bytes:
    """Encode a line.

    Args:
        info: The session.
        system_ids: Ids of the system prompt; None if they are those of the lines before.
        first: This line replaces all turns and evictions from this turn on; 1 for a line with the whole session.
        turns: The turns from `first` on.
        evictions: The evictions of these turns.
    """
    value = {
        "info": {name: each for name, each in asdict(info).items() if name not in _LOCAL},
        "system_ids": None if system_ids is None else _text(system_ids),
        "first": first,
        "turns": [asdict(replace(turn, ids=array("i"))) | {"ids": _text(turn.ids)} for turn in turns],
        "evictions": [asdict(each) for each in evictions],
    }
    data = json.dumps(value, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(data), data)


def read_log(data: bytes, name: str = "the log of this session") -> StoredSession | None:
    """Return the session in a log; None if its only line is not complete.

    Args:
        data: The log.
        name: Name of its file, for errors.

    Raises:
        StoreError: A line before the last one is damaged, or another version of streamchat wrote a complete line.
    """
    found: StoredSession | None = None
    for text in _texts(data, name):
        try:
            found = _applied(found, json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise StoreError(
                f"another version of streamchat wrote {name}; use the same version on all machines"
            ) from error
    return found


def _texts(data: bytes, name: str) -> Iterator[bytes]:
    *lines, rest = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line[:9] != b"%08x " % zlib.crc32(line[9:]):
            if number < len(lines) or rest:
                raise StoreError(
                    f"{name} is damaged at line {number} of {len(lines)}, so that confirmed turns are missing; restore "
                    "the file from a backup, or delete the folder of the session"
                )
            return
        yield line[9:]


def _applied(found: StoredSession | None, value: dict[str, Any]) -> StoredSession:
    """Return the session after a line; raises ValueError for a first line without the whole session."""
    first = value["first"]
    if first < 1 or (found is None and first != 1):
        raise ValueError("earlier turns are missing")
    before = found or StoredSession(_info(value["info"], 0), array("i"), ())
    turns = (*before.turns[: first - 1], *map(_turn, value["turns"]))
    return StoredSession(
        _info(value["info"], len(turns)),
        before.system_ids if value["system_ids"] is None else _ids(value["system_ids"]),
        turns,
        (*(each for each in before.evictions if each.turn < first), *map(_eviction, value["evictions"])),
    )


def _text(ids: Iterable[int]) -> str:
    return base64.b64encode(pack_ids(ids)).decode("ascii")


def _ids(text: str) -> array[int]:
    return unpack_ids(base64.b64decode(text))


def _runs(value: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((first, stop) for first, stop in value)


def _info(value: dict[str, Any], turns: int) -> SessionInfo:
    names = {field.name for field in fields(SessionInfo)} - set(_LOCAL)
    given = {name: value[name] for name in names}
    return SessionInfo(**given | {"held": _runs(given["held"]), "pins": _runs(given["pins"]), "turns": turns})


def _turn(value: dict[str, Any]) -> StoredTurn:
    before = value["before"]
    mark = CacheMark(_runs(before["held"]), _runs(before["pins"]), tuple(before["turn_starts"]), before["compressions"])
    return StoredTurn(**value | {"ids": _ids(value["ids"]), "before": mark})


def _eviction(value: dict[str, Any]) -> StoredEviction:
    return StoredEviction(**value | {"runs": _runs(value["runs"])})
