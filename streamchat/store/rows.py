"""Converts database rows to records. Drops and names damaged parts of a row; keeps its texts."""

from __future__ import annotations

import json
import math
import sqlite3
from array import array
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from streamchat.store.records import (
    CacheMark,
    Run,
    SessionInfo,
    StoredEviction,
    StoredSession,
    StoredTurn,
    unpack_ids,
)

LATEST = 253402300799.0
"""The end of the year 9999, in seconds since 1970; later times cannot be formatted as a date."""
LARGEST = 2**31 - 1
"""Largest id, and largest log index."""
HARMLESS = ("the settings", "the figures")
"""Prefixes of the names of parts whose damage does not invalidate the saved ids."""
Damage = list[str]
"""Names of the damaged parts."""


def session_of(row: sqlite3.Row, turns: Sequence[sqlite3.Row], evictions: Sequence[sqlite3.Row]) -> StoredSession:
    """Build a session from its rows.

    Turns are numbered from 1. If a part that says which ids exist or which of them are cached is damaged, the ids are
    not used: the tokenizer is then '', as in an imported session, so that resuming encodes the texts again.
    """
    damage: Damage = []
    info = info_of(row, damage)
    system_ids = _ids(row["system_ids"], "the ids of the system prompt", damage)
    read: list[StoredTurn] = []
    index = len(system_ids)
    for stored in turns:
        if stored["said"] is None and stored["reply"] is None:
            damage.append(f"turn {stored['number']} (no message)")
            continue
        read.append(_turn(stored, len(read) + 1, index, damage))
        index += len(read[-1].ids)
    if any(turn.state == "running" for turn in read[:-1]):
        damage.append("the state of a turn")
        read[:-1] = [replace(turn, state="done") for turn in read[:-1]]
    if any(stop > index for _, stop in (*info.held, *info.pins)):
        damage.append("the cache state")
    evicted = [_eviction(each, damage) for each in evictions]
    if any(not part.startswith(HARMLESS) for part in damage):
        info = replace(info, tokenizer="", held=(), pins=())
    return StoredSession(info, system_ids, tuple(read), tuple(each for each in evicted if each), tuple(damage))


def info_of(row: sqlite3.Row, damage: Damage | None = None) -> SessionInfo:
    """Build a session without its turns; append the names of damaged parts to `damage`."""
    damage = [] if damage is None else damage
    settings = _json(row["settings"])
    if not isinstance(settings, dict):
        damage.append("the settings")
        settings = {}
    checked = {
        "created": moment(row["created"]),
        "updated": moment(row["updated"]),
        "settings": settings,
        "held": _runs(_json(row["held"]), "the cache state", damage),
        "pins": _runs(_json(row["pins"]), "the pins", damage),
        "compressions": _count(row["compressions"]),
        "parent_turn": None if row["parent_turn"] is None else _count(row["parent_turn"]),
    }
    return SessionInfo(**{field.name: row[field.name] for field in fields(SessionInfo)} | checked)


def figures_of(text: str | None) -> dict[str, Any] | None:
    """Decode a JSON object of figures; None if it is missing or damaged."""
    figures = _json(text)
    return figures if isinstance(figures, dict) else None


def moment(value: Any) -> float:
    """Return `value` as seconds since 1970; 0 if it is not a valid time."""
    legal = isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= LATEST
    return float(value) if legal else 0.0


def _turn(row: sqlite3.Row, number: int, start: int, damage: Damage) -> StoredTurn:
    """Build turn `number`, whose ids should start at log index `start`."""
    name = f"turn {row['number']}"
    ids = _ids(row["ids"], f"the ids of {name}", damage)
    message_start, reply_start = row["content"], row["reply_first"]
    end = start + len(ids) if row["state"] == "done" else LARGEST  # a running turn may not be prefilled yet
    if (row["number"], row["first"]) != (number, start) or not start <= message_start <= reply_start <= end:
        damage.append(f"the position of {name}")
        message_start = reply_start = start
    stats = figures_of(row["stats"])
    if row["stats"] is not None and stats is None:
        damage.append(f"the figures of {name}")
    return StoredTurn(
        number=number,
        text=row["said"] or "",
        reply=row["reply"] or "",
        start=start,
        message_start=message_start,
        reply_start=reply_start,
        ids=ids,
        before=mark_of(row["before"], start, f"the cache before {name}", damage),
        state=row["state"],
        started=moment(row["started"]),
        finished=None if row["finished"] is None else moment(row["finished"]),
        stats=stats,
        finish_reason=row["finish_reason"],
    )


def mark_of(text: str, before: int, name: str, damage: Damage) -> CacheMark:
    """Build the bookkeeping of a cache; that of an unknown one if it is damaged, or has tokens from `before` on."""
    found: Damage = []
    mark = _json(text)
    if not isinstance(mark, dict):
        damage.append(name)
        return CacheMark()
    held = _runs(mark.get("held", []), name, found)
    pins = _runs(mark.get("pins", []), name, found)
    starts = mark.get("turn_starts", [])
    if not isinstance(starts, list) or not all(_is_index(start) for start in starts):
        found.append(name)
        starts = []
    compressions = mark.get("compressions", 0)
    contents = [mark.get(name, 0) for name in ("base", "originals", "generation", "epoch")]
    if found or not all(_is_index(count) for count in (compressions, *contents)):
        damage.append(name)
        return CacheMark()
    if any(stop > before for _, stop in (*held, *pins)):  # of ids that were replaced when another model resumed
        return CacheMark()
    return CacheMark(held, pins, tuple(starts), compressions, *contents)


def _eviction(row: sqlite3.Row, damage: Damage) -> StoredEviction | None:
    runs = _json(row["runs"])
    if not isinstance(runs, list) or not all(_is_run(run) for run in runs):
        damage.append(f"an eviction of turn {row['turn']}")
        return None
    pairs = tuple((first, stop) for first, stop in runs)
    return StoredEviction(
        row["turn"], moment(row["at"]), row["cause"], pairs, row["length_before"], row["length_after"]
    )


def _ids(data: bytes, name: str, damage: Damage) -> array[int]:
    ids = unpack_ids(data) if len(data) % 4 == 0 else array("i")
    if len(data) % 4 or (ids and min(ids) < 0):
        damage.append(name)
        return array("i")
    return ids


def _runs(value: Any, name: str, damage: Damage) -> tuple[Run, ...]:
    """Return runs [first, stop) if they are in increasing order, else ()."""
    runs: list[Run] = []
    given: list[Any] = value if isinstance(value, list) else [None]
    edge = 0
    for run in given:
        if not _is_run(run) or run[0] < edge or run[0] == run[1]:
            break
        runs.append((run[0], run[1]))
        edge = run[1]
    else:
        return tuple(runs)
    damage.append(name)
    return ()


def _is_run(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(_is_index(each) for each in value)
    return pair and value[0] <= value[1]


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _count(value: int) -> int:
    return value if 0 <= value <= LARGEST else 0


def _json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
