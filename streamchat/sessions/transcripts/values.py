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
    number: int = 0
    """Number of the item in an array, from 1; 0 if it is not in one."""


def read_records(text: str) -> list[Record] | None:
    """Return the records of a JSON file, or None for plain text.

    A text is JSON if it starts with `{` or `[`, or if one of its lines is a record of a known kind.

    Raises:
        TranscriptError: The text starts like JSON but is not valid JSON.
    """
    rows = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    if not rows:
        return []
    opening = rows[0][1].lstrip()[0]
    is_json = opening in "{["
    is_array = opening == "[" and len(rows) == 1  # parsed once only: an export of 200 MB may be one line
    first = Record(rows[0][0], problem="not read yet") if is_array else _record(*rows[0])
    if is_json and first.problem:
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
    """Return the records of a text that is one JSON value: the value itself, or the items of an array.

    Raises:
        ValueError: It is not valid JSON.
        RecursionError: It is nested too deeply.
    """
    if text.lstrip()[0] != "[":
        return [Record(1, json.loads(text))]
    try:
        items = list(_items(text))
    except (ValueError, IndexError):
        json.loads(text)  # raises the error with its place
        raise
    if items and all((found := format_of(item.value)) and found.is_message for item in items):
        return [Record(1, {"messages": [item.value for item in items]})]
    return items


def _items(text: str) -> Iterator[Record]:
    """Yield the items of the JSON array `text`, each with its number and the line where it starts.

    Raises:
        ValueError: It is not a valid array.
        IndexError: It has no end.
    """
    at = _space(text, text.index("[") + 1)
    line, counted, number = 1, 0, 0
    is_last = text[at] == "]"
    while not is_last:
        line, counted, number = line + text.count("\n", counted, at), at, number + 1
        value, at = _DECODER.raw_decode(text, at)
        yield Record(line, value, number=number)
        at = _space(text, at)
        is_last = text[at] == "]"
        if not is_last:
            if text[at] != ",":
                raise ValueError("expected a comma")
            at = _space(text, at + 1)
    if text[at + 1 :].strip():
        raise ValueError("text after the array")


def _space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number has too many digits"  # the only other error: Python reads 4,300
