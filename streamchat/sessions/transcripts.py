"""Reads conversations in the JSON formats of data sets and other programs.

A file may be JSON lines, one object, or one array. Roles and contents are checked strictly: whatever cannot be
represented raises `TranscriptError`, so that no part of a conversation is dropped silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from streamchat.base.jsonlines import split_lines

Role = Literal["system", "user", "assistant"]
Kind = Literal["conversations", "mt-bench", "messages"]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",  # ShareGPT's names
    "assistant": "assistant",
    "gpt": "assistant",
}
ACCEPTED = (
    'accepted are {"messages": [...]}, {"conversations": [...]} and {"turns": [...]}, a message {"role", "content"} or '
    '{"from", "value"}, and plain text'
)
TEXT_PARTS = ("text", "input_text", "output_text")
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


class TranscriptError(ValueError):
    """A file, record or message cannot be read; the text says why, but not where."""


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
    lines = [_record(number, line) for number, line in rows]
    is_json = rows[0][1].lstrip()[0] in "{["
    if is_json and not lines[0].problem and not (len(rows) == 1 and isinstance(lines[0].value, list)):
        return lines
    if is_json:
        try:
            return _whole(text)
        except (ValueError, RecursionError) as error:
            failure = error
    if any(kind_of(record.value) for record in lines):
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


def kind_of(value: Any) -> Kind | None:
    """Return the kind of a record; None if it is unknown."""
    if not isinstance(value, dict):
        return None
    if "messages" in value or "conversations" in value:
        return "conversations"
    if "turns" in value:
        return "mt-bench"
    if "streamchat" in value or "role" in value or ("from" in value and "value" in value):
        return "messages"
    return None


def unknown(value: Any) -> str:
    """Return the end of an error message about a record of an unknown kind."""
    if isinstance(value, dict):
        names = [json.dumps(key) for key in list(value)[:6]]
        found = f"an object with {', '.join(names) or 'no keys'}{', ...' if len(value) > 6 else ''}"
    else:
        found = f"{_type_name(value)}"
    return f"it is JSON, {found}; {ACCEPTED}"


def messages_of(record: dict[str, Any]) -> list[tuple[Role, str]]:
    """Return the messages of a record of kind `conversations`.

    Raises:
        TranscriptError: A message cannot be read.
    """
    name = "messages" if "messages" in record else "conversations"
    messages = record[name]
    if not isinstance(messages, list):
        raise TranscriptError(f'"{name}" must be a list')
    if record.get("tools") not in (None, "", "[]", []):
        raise TranscriptError('it has "tools", which cannot be replayed')
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise TranscriptError('"system" must be a string')
    head: list[tuple[Role, str]] = [("system", system)] if system else []
    return head + [message_of(message) for message in messages]


def message_of(message: Any) -> tuple[Role, str]:
    """Return the role and text of one message.

    Raises:
        TranscriptError: The role is unknown, or the content is not only text.
    """
    keys = ("role", "content") if isinstance(message, dict) and "role" in message else ("from", "value")
    if not isinstance(message, dict) or any(key not in message for key in keys):
        raise TranscriptError('a message needs "role" and "content", or "from" and "value"')
    role, content = (message[key] for key in keys)
    if not isinstance(role, str) or role not in ROLES:
        raise TranscriptError(f"unknown role {_short(role)}; known roles are {', '.join(ROLES)}")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise TranscriptError(f'a message from {role} has "{key}", which cannot be replayed')
    if isinstance(content, list):
        return ROLES[role], "\n".join(_part(part, role) for part in content)
    if not isinstance(content, str):
        raise TranscriptError(f"the content of a message from {role} must be a string, not {_type_name(content)}")
    return ROLES[role], content


def _part(part: Any, role: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str) or (isinstance(part, dict) and kind not in TEXT_PARTS):
        raise TranscriptError(f"a message from {role} has a part of type {_short(kind)}; only text can be replayed")
    return text


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
    if value and all(kind_of(item) == "messages" for item in value):
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


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)
