"""The form that all formats are read into, and the messages of OpenAI and ShareGPT.

Roles and contents are checked strictly: whatever cannot be represented raises `TranscriptError` or is counted as
skipped, so that no part of a conversation is dropped silently.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from streamchat.base.formatting import plural

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",  # ShareGPT's names
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",  # Gemini's name
}
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation")
"""Roles of messages between a model and a program, which an import skips."""
TOOL_CALLS = ("tool_calls", "function_call")
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "input_audio": "audio recording",
    "audio": "audio recording",
    "file": "file",
    "input_file": "file",
}
"""What a content part of this type is called."""


class TranscriptError(ValueError):
    """A file, record or message cannot be read; the text says why.

    Args:
        reason: Why, as the end of a sentence.
        line: Line of the record; 0 if it is about the whole file or the caller knows.
    """

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    text: str
    line: int = 0
    """Line of the file that its record starts on."""
    at: Any = None
    """When it was sent, as the file says it: seconds since 1970 unless the file is wrong."""
    finish_reason: Any = None
    """Why a reply ended, as the file says it: a `FinishReason` in our exports."""


@dataclass
class Transcript:
    """One conversation of a file."""

    messages: list[Message]
    line: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    """What the file says about it, unchecked: `title` and `model_name`, and in our exports `model` and `settings`."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What has no text and was skipped: singular noun -> number."""


def conversation_of(record: dict[str, Any], skipped: Counter[str] | None = None) -> Transcript:
    """Return the conversation of a record {"messages": [...]} or {"conversations": [...]}; see `message_of`.

    Raises:
        TranscriptError: A message cannot be read.
    """
    name = "messages" if "messages" in record else "conversations"
    messages = record[name]
    if not isinstance(messages, list):
        raise TranscriptError(f'"{name}" must be a list')
    if skipped is None and record.get("tools") not in (None, "", "[]", []):
        raise TranscriptError('it has "tools", which cannot be replayed')
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise TranscriptError('"system" must be a string')
    head = [Message("system", system)] if system else []
    read = [message for each in messages if (message := message_of(each, skipped)) is not None]
    return Transcript([*head, *read], about={"title": record.get("title")})


def message_of(message: Any, skipped: Counter[str] | None = None) -> Message | None:
    """Return one message {"role", "content"} or {"from", "value"}; None if it is of a tool and skipped.

    Args:
        message: The JSON value.
        skipped: Counts images, audio and files, whose place in the text is marked, and messages to and from tools;
            None refuses them.

    Raises:
        TranscriptError: The role is unknown, or the content cannot be read.
    """
    keys = ("role", "content") if isinstance(message, dict) and "role" in message else ("from", "value")
    if not isinstance(message, dict) or any(key not in message for key in keys):
        raise TranscriptError('a message needs "role" and "content", or "from" and "value"')
    role, content = (message[key] for key in keys)
    if skipped is not None and role in TOOL_ROLES:
        skipped["tool message"] += 1
        return None
    if not isinstance(role, str) or role not in ROLES:
        raise TranscriptError(f"unknown role {short_json(role)}; known roles are {', '.join(ROLES)}")
    calls = next((key for key in TOOL_CALLS if message.get(key)), None)
    if calls and skipped is None:
        raise TranscriptError(f'a message from {role} has "{calls}", which cannot be replayed')
    if calls and skipped is not None:
        skipped["tool message"] += 1
        if not content:
            return None
    if isinstance(content, list):
        content = "\n".join(_part(part, role, skipped) for part in content)
    if not isinstance(content, str):
        raise TranscriptError(f"the content of a message from {role} must be a string, not {type_name(content)}")
    return Message(ROLES[role], content, at=message.get("at"), finish_reason=message.get("finish_reason"))


def _part(part: Any, role: str, skipped: Counter[str] | None) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else part
    if skipped is not None and isinstance(kind, str) and kind in MEDIA:
        return skip(MEDIA[kind], skipped)
    if not isinstance(text, str) or (isinstance(part, dict) and kind not in TEXT_PARTS):
        raise TranscriptError(f"a message from {role} has a part of type {short_json(kind)}; only text can be replayed")
    return text


def skip(what: str, skipped: Counter[str]) -> str:
    """Count a part without text, and return the mark that stands in its place."""
    skipped[what] += 1
    return f"[{what}]"


def counted(skipped: Counter[str]) -> str:
    """Return what was skipped, most first, for a message: "2 images, 1 file"."""
    return ", ".join(plural(count, what) for what, count in skipped.most_common())


def short_json(value: Any) -> str:
    """Return the start of `value` as JSON, for a message."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def type_name(value: Any) -> str:
    """Return what a JSON value is, for a message: "a list"."""
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
