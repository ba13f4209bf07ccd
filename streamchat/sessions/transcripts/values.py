"""The JSON values of a file, with their lines: JSON lines, one object, or the items of one array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from streamchat.base.jsonlines import split_lines
from streamchat.sessions.transcripts.formats import format_of, unknown
from streamchat.sessions.transcripts.messages import TranscriptError

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One JSON value of a file."""

    line: int
    value: Any = None
    problem: str = ""
    """Why the value is missing; '' if it is not."""


def read_records(text: str) -> list[Record] | None:
    """Return the records of a JSON file, or None for plain text.

    A text is JSON if it starts with `{` or `[`, or if one of its lines is a record of a known kind.

    Raises:
        TranscriptError: The text starts like JSON but is not valid JSON.
    """
    rows = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    if not rows:
        return []
    first = _record(*rows[0])
    is_json = rows[0][1].lstrip()[0] in "{["
    if is_json and (first.problem or (len(rows) == 1 and isinstance(first.value, list))):
        try:
            return _whole(text)
        except (ValueError, RecursionError) as error:
            failure = error
    lines = [first, *(_record(number, line) for number, line in rows[1:])]
    if is_json and not first.problem:
        return lines
    if any(format_of(record.value) for record in lines):
        return lines
    if not is_json:
        return None
    raise TranscriptError(f"it starts like JSON but is invalid: {_reason(failure)}")


def scalar_in(text: str) -> str:
    """Return the end of an error message if the text is a JSON string, number, true, false or null; else ''."""
    try:
        return unknown(json.loads(text))
    except (ValueError, RecursionError):
        return ""


def _record(number: int, text: str) -> Record:
    try:
        return Record(number, json.loads(text))
    except (ValueError, RecursionError) as error:
        where = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else _reason(error)
        return Record(number, problem=f"this is not JSON ({where})")


def _whole(text: str) -> list[Record]:
    """Return the records of a text that is one JSON value: the value itself, or the items of an array."""
    value = json.loads(text)
    if not isinstance(value, list):
        return [Record(1, value)]
    if value and all((found := format_of(item)) and found.is_message for item in value):
        return [Record(1, {"messages": value})]
    return list(_items(text))


def _items(text: str) -> Iterator[Record]:
    """Yield the items of the valid JSON array `text`, each with the line where it starts."""
    at = text.index("[") + 1
    line, counted = 1, 0
    while True:
        at = _space(text, at)
        if text[at] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        value, at = _DECODER.raw_decode(text, at)
        yield Record(line, value)
        at = _space(text, at)
        at += text[at] == ","


def _space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
