"""A saved conversation as Markdown for people, as JSON lines for programs, and back."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from streamchat.base.errors import ConfigError, StoreError
from streamchat.base.formatting import plural
from streamchat.base.jsonlines import json_line
from streamchat.base.thinking import ONLY_REASONING, split
from streamchat.config.loader import check_value
from streamchat.config.settings import setting_fields
from streamchat.sessions.contained import contained, literal
from streamchat.sessions.transcripts import (
    Role,
    TranscriptError,
    kind_of,
    message_of,
    messages_of,
    read_records,
    scalar_in,
    unknown,
)
from streamchat.store.records import StoredSession, StoredTurn, clean
from streamchat.store.rows import LATEST

Format = Literal["markdown", "jsonl", "replay"]
FORMATS: dict[str, Format] = {".md": "markdown", ".jsonl": "jsonl", ".json": "replay"}
"""By the end of a file's name."""
VERSION = 1


def export(session: StoredSession, kind: Format) -> str:
    """The whole text of the file.

    `markdown` is for reading and marks the edge of memory; `jsonl` has everything that `read_export` needs, a line a
    message; `replay` is one line {"messages": [...]}, as `streamchat replay` and many data sets have it.
    """
    if kind == "markdown":
        return "\n".join(_markdown(session)) + "\n"
    if kind == "replay":
        return json_line({"id": session.info.id, "messages": _messages(session)}) + "\n"
    return "".join(json_line(row) + "\n" for row in _rows(session))


def write_export(path: Path, text: str) -> None:
    """Write a new file, readable by the user only.

    Raises:
        StoreError: It exists already, or cannot be written.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise StoreError(f"{path} exists already; give another name") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StoreError(f"{path} cannot be written ({reason}); give another name") from error


def _system_prompt(session: StoredSession) -> str:
    return str(session.info.settings.get("system_prompt") or "")


def _sinks(session: StoredSession) -> int:
    sinks = session.info.settings.get("num_sink_tokens", 0)
    return sinks if isinstance(sinks, int) else 0


def _messages(session: StoredSession) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": prompt}] if (prompt := _system_prompt(session)) else []
    for turn in session.turns:
        messages.append({"role": "user", "content": turn.text})
        if turn.reply:
            messages.append({"role": "assistant", "content": turn.reply})
    return messages


def _rows(session: StoredSession) -> Iterator[dict[str, Any]]:
    info = session.info
    yield {
        "streamchat": VERSION,
        "id": info.id,
        "title": info.title,
        "created": info.created,
        "model": info.model,
        "model_name": info.model_name,
        "settings": dict(info.settings),
    }
    for turn in session.turns:
        about = {"turn": turn.number, "at": turn.started}
        yield {"role": "user", "content": turn.text, **about}
        more = {"finish_reason": turn.finish_reason} if turn.finish_reason else {}
        yield {"role": "assistant", "content": turn.reply, **about, **more}


# --- Markdown ---------------------------------------------------------------------------------------------------


def held_turns(session: StoredSession) -> dict[int, Literal["seen", "partly", "forgotten"]]:
    """What of each turn the cache still holds; sinks do not count."""
    sinks = _sinks(session)
    answer: dict[int, Literal["seen", "partly", "forgotten"]] = {}
    for turn in session.turns:
        first, stop = max(turn.start, sinks), turn.start + len(turn.ids)
        held = sum(max(0, min(stop, b) - max(first, a)) for a, b in session.info.held)
        answer[turn.number] = "seen" if held >= stop - first else "partly" if held > 0 else "forgotten"
    return answer


def _markdown(session: StoredSession) -> Iterator[str]:
    info = session.info
    yield f"# {literal(info.title)}"
    yield ""
    turns = plural(len(session.turns), "turn")
    yield f"{literal(info.model_name)}, {_date(info.created)} to {_date(info.updated)}, {turns}"
    if prompt := _system_prompt(session):
        yield ""
        yield "## System prompt"
        yield ""
        yield contained(prompt)
    memory = held_turns(session)
    forgotten_before = any(state == "forgotten" for state in memory.values())
    edge = next(
        (turn.number for turn in session.turns if memory[turn.number] != "forgotten" and not _is_pinned(session, turn)),
        None,
    )
    for turn in session.turns:
        if turn.number == edge and (forgotten_before or memory[turn.number] == "partly"):
            yield ""
            yield "---"
            yield ""
            yield "*Edge of memory: what stands above is no longer seen by the model, but for pinned turns.*"
            yield ""
            yield "---"
        pinned = " (pinned)" if _is_pinned(session, turn) else ""
        yield ""
        yield f"## {turn.number}. You{pinned}"
        yield ""
        yield contained(turn.text)
        yield ""
        yield f"## {turn.number}. {literal(info.model_name)}"
        yield ""
        yield from _reply(turn.reply, str(info.settings.get("thinking", "")))


def _reply(reply: str, thinking: str) -> Iterator[str]:
    """The answer, under the reasoning as a quotation unless that is hidden."""
    thoughts, answer = split(reply)
    if thoughts and thinking != "hide":
        yield "> *Reasoning*"
        yield ">"
        yield from (f"> {line}".rstrip() for line in contained(thoughts).splitlines())
        yield ""
    yield contained(answer) or (f"*({ONLY_REASONING})*" if thoughts else "*(no reply)*")


def _is_pinned(session: StoredSession, turn: StoredTurn) -> bool:
    first = max(turn.start, _sinks(session))
    return any(a <= first and turn.start + len(turn.ids) <= b for a, b in session.info.pins)


def _date(then: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(then))


# --- and back ---------------------------------------------------------------------------------------------------


class ImportedSession:
    """What a JSON lines export says."""

    def __init__(self, head: dict[str, Any], turns: list[StoredTurn]) -> None:
        self.title = " ".join(_text(head, "title").split()) or "imported"
        self.model = _text(head, "model") or "default"
        self.model_name = " ".join(_text(head, "model_name").split()) or self.model
        self.settings = _legal_settings(head.get("settings"))
        self.turns = turns


def _text(head: dict[str, Any], name: str) -> str:
    value = head.get(name)
    return clean(value) if isinstance(value, str) else ""


def _legal_settings(given: Any) -> dict[str, Any]:
    """Those that this streamchat knows and takes; one of another version is no reason to refuse a conversation."""
    settings: dict[str, Any] = {}
    for name, value in given.items() if isinstance(given, dict) else ():
        if name in setting_fields():
            with suppress(ConfigError):
                settings[name] = check_value(name, value, "the file")
    return settings


def read_export(path: Path) -> ImportedSession:
    """Read what `export(..., 'jsonl')` or 'replay' wrote, or one conversation in a form of `transcripts`.

    Raises:
        StoreError: The file cannot be read, or a record of it cannot; with its line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        records = read_records(text)
    except UnicodeDecodeError:
        raise StoreError(f"{path} is not UTF-8 text; only exports of streamchat can be imported") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except TranscriptError as error:
        raise StoreError(f"{path}: {error}; nothing was imported") from None
    if records is None and (scalar := scalar_in(text)):
        raise StoreError(f"{path}, line 1: {scalar}; nothing was imported")
    if records is None:
        raise StoreError(f"{path} is plain text and not JSON; nothing was imported")
    head: dict[str, Any] = {}
    messages: list[tuple[Role, str, float]] = []
    conversations = 0
    for record in records:
        value = record.value
        if record.problem:
            raise StoreError(f"{path}, line {record.line}: {record.problem}; nothing was imported")
        kind = kind_of(value)
        try:
            if kind == "conversations":
                conversations += 1
                head = head or {"title": _text(value, "title") or path.stem}
                for role, content in messages_of(value):
                    _take(role, content, time.time(), head, messages)
            elif kind == "messages" and "streamchat" in value:
                conversations += 1
                head = _head(value, path)
            elif kind == "messages":
                _take(*message_of(value), _moment(value.get("at")), head, messages)
            else:
                raise TranscriptError(unknown(value) if kind is None else "it has user messages only")
        except TranscriptError as error:
            raise StoreError(f"{path}, line {record.line}: {error}; nothing was imported") from None
    if conversations > 1:
        raise StoreError(f"{path} has {conversations} conversations; give a file with one; nothing was imported")
    turns = _turns(messages)
    if not turns:
        raise StoreError(f"{path} has no messages; give a file that `streamchat sessions export` wrote")
    return ImportedSession(head or {"title": path.stem}, turns)


def _head(record: dict[str, Any], path: Path) -> dict[str, Any]:
    if record["streamchat"] != VERSION:
        raise StoreError(f"{path}: format {record['streamchat']} is not known; this streamchat reads {VERSION}")
    return record


def _take(role: Role, content: str, at: float, head: dict[str, Any], messages: list[tuple[Role, str, float]]) -> None:
    content = clean(content)
    if role != "system":
        messages.append((role, content, at))
        return
    settings = head.get("settings")
    head["settings"] = {**(settings if isinstance(settings, dict) else {}), "system_prompt": content}


def _moment(at: Any) -> float:
    """Seconds since 1970 where `at` is such a time, else now."""
    legal = isinstance(at, int | float) and not isinstance(at, bool) and 0 <= at <= LATEST
    return float(at) if legal else time.time()


def _turns(messages: list[tuple[Role, str, float]]) -> list[StoredTurn]:
    """User and assistant in pairs; messages of one role in a row are one message, and a missing one is empty."""
    turns: list[StoredTurn] = []
    last = ""
    for role, content, at in messages:
        if role == "user" and last == "user":
            turns[-1].text += "\n\n" + content
        elif role == "user" or not turns:
            text, reply = (content, "") if role == "user" else ("", content)
            turns.append(StoredTurn(len(turns) + 1, text, reply, 0, 0, 0, array("i"), started=at, finished=at))
        else:
            turns[-1].reply += ("\n\n" if turns[-1].reply else "") + content
        last = role
    return turns
