"""The table of transcript formats, which the reader, the messages, the help and the docs use."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from streamchat.sessions.transcripts import chatgpt, messages
from streamchat.sessions.transcripts.messages import Message, Transcript, TranscriptError

Kind = Literal["conversations", "mt-bench", "messages", "chatgpt", "text"]


@dataclass(frozen=True)
class Format:
    """A format of transcripts in JSON."""

    name: Kind
    record: str
    """What a record looks like."""
    what: str
    """Where it comes from, for the docs."""
    matches: Callable[[dict[str, Any]], bool]
    """Returns whether an object is a record of this format."""
    read: Callable[[dict[str, Any], Counter[str] | None], Transcript]
    """Reads a record; counts what has no text, or refuses it if given None. Raises `TranscriptError`."""
    is_message: bool = False
    """Whether a record is one message, and the file one conversation."""


def _mt_bench(record: dict[str, Any], skipped: Counter[str] | None) -> Transcript:
    turns = record["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise TranscriptError('"turns" must be a list of texts')
    return Transcript([Message("user", turn) for turn in turns if turn.strip()])


def _message(record: dict[str, Any], skipped: Counter[str] | None) -> Transcript:
    if "streamchat" in record:  # the header of an export
        return Transcript([], about=record)
    message = messages.message_of(record, skipped)
    return Transcript([] if message is None else [message])


# the first that matches
FORMATS = (
    Format(
        "conversations",
        '{"messages": [{"role", "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}',
        "OpenAI and ShareGPT; `streamchat sessions export --format replay`",
        lambda record: "messages" in record or "conversations" in record,
        messages.conversation_of,
    ),
    Format("mt-bench", '{"turns": [...]}', "MT-Bench's `question.jsonl`", lambda record: "turns" in record, _mt_bench),
    Format(
        "chatgpt",
        '{"mapping": {...}, "current_node"}',
        "ChatGPT's data export, `conversations.json`",
        lambda record: "mapping" in record and "current_node" in record,
        lambda record, skipped: chatgpt.conversation_of(record),
    ),
    Format(
        "messages",
        '{"role", "content"} or {"from", "value"}',
        "one message; the file is one conversation (`streamchat sessions export --format jsonl`)",
        lambda record: "streamchat" in record or "role" in record or ("from" in record and "value" in record),
        _message,
        is_message=True,
    ),
)
KINDS: tuple[Kind, ...] = (*(each.name for each in FORMATS), "text")
"""Names of all formats. `text` is plain text: each line is a user message."""
ACCEPTED = f"accepted formats: {', '.join(each.record for each in FORMATS)}"


def format_of(value: Any) -> Format | None:
    """Return the format of a record; None if it is unknown."""
    if not isinstance(value, dict):
        return None
    return next((each for each in FORMATS if each.matches(value)), None)


def unknown(value: Any) -> str:
    """Return the end of an error message about a record of an unknown format."""
    if isinstance(value, dict):
        names = [json.dumps(key) for key in list(value)[:6]]
        found = f"an object with {', '.join(names) or 'no keys'}{', ...' if len(value) > 6 else ''}"
    else:
        found = messages.type_name(value)
    return f"it is JSON, {found}; {ACCEPTED}"
