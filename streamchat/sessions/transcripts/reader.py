"""Reads the conversations of a file, in any format of `formats`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from streamchat.base.jsonlines import split_lines
from streamchat.sessions.transcripts.formats import Format, Kind, format_of, unknown
from streamchat.sessions.transcripts.messages import Message, Transcript, TranscriptError
from streamchat.sessions.transcripts.values import Record, read_records


@dataclass
class TranscriptFile:
    """What a file contains."""

    kind: Kind
    transcripts: list[Transcript] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    """Line and reason of each record that cannot be used."""


def read_transcripts(text: str, wanted: Kind | Literal["auto"] = "auto", *, skip_media: bool = False) -> TranscriptFile:
    """Read all conversations of a file, in order.

    Args:
        text: The contents of the file.
        wanted: The format; 'auto' detects it from the first record of a known format.
        skip_media: Skip and count images, audio and files in the messages of OpenAI, instead of refusing the message.
            Those of ChatGPT's export are always skipped.

    Raises:
        TranscriptError: The text is JSON of an unknown format, or not JSON although `wanted` is.
    """
    records = None if wanted == "text" else read_records(text)
    if records is None:
        if wanted not in ("auto", "text"):
            raise TranscriptError("it is not JSON")
        return TranscriptFile("text", _plain_text(text))
    found = next((each for record in records if (each := format_of(record.value))), None)
    if records and found is None:
        first = next((record for record in records if not record.problem), records[0])
        raise TranscriptError(unknown(first.value), first.line)
    kind = wanted if wanted != "auto" else found.name if found else "text"
    file = TranscriptFile(kind)
    share_lines = len({record.line for record in records}) < len(records)
    for record in records:
        try:
            _add(record, file, Counter() if skip_media else None)
        except TranscriptError as error:  # part of a conversation would be misleading, so all of the record is skipped
            where = f"item {record.number}: " if share_lines and record.number else ""
            file.problems.append((record.line, f"{where}{error}"))
    return file


def _plain_text(text: str) -> list[Transcript]:
    lines = [(number, line.strip()) for number, line in enumerate(split_lines(text), 1)]
    messages = [Message("user", line, number) for number, line in lines if line]
    return [Transcript(messages, messages[0].line)] if messages else []


def _add(record: Record, file: TranscriptFile, skipped: Counter[str] | None) -> None:
    """Add the conversation of a record, or its message to the conversation of the file."""
    if record.problem:
        raise TranscriptError(record.problem)
    found = format_of(record.value)
    if found is None:
        raise TranscriptError(unknown(record.value))
    if found.name != file.kind:
        raise TranscriptError(f"this record has the format {found.name}, but the file has {file.kind}")
    read = found.read(record.value, skipped)
    read.line = record.line
    read.messages = [replace(message, line=record.line) for message in read.messages]
    read.skipped.update(skipped or {})
    if _continues(found, read, file):
        file.transcripts[-1].messages += read.messages
        file.transcripts[-1].skipped.update(read.skipped)
    else:
        file.transcripts.append(read)


def _continues(found: Format, read: Transcript, file: TranscriptFile) -> bool:
    """Return whether a record belongs to the conversation before it; the header of an export starts a new one."""
    return found.is_message and not read.about and bool(file.transcripts)
