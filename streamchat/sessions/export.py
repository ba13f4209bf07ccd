"""Exports a saved session as Markdown for people or JSON lines for programs, and imports one."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from streamchat.base.atomic_files import write_new
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
"""Format by file name extension."""
VERSION = 1


def export(session: StoredSession, kind: Format) -> str:
    """Return the whole text of the file.

    `markdown` is for reading and marks where the model's context starts; `jsonl` has everything that `read_export`
    needs, one message per line; `replay` is one line {"messages": [...]}, the format of `streamchat replay` and many
    data sets.
    """
    if kind == "markdown":
        return "\n".join(_markdown(session)) + "\n"
    if kind == "replay":
        return json_line({"id": session.info.id, "messages": _messages(session)}) + "\n"
    return "".join(json_line(row) + "\n" for row in _rows(session))


def write_export(path: Path, text: str) -> None:
    """Write a new file that only the user can read.

    Raises:
        StoreError: The file exists or cannot be written.
    """
    try:
        write_new(path, text, durable=True)  # its session may be deleted next
    except FileExistsError:
        raise StoreError(f"{path} already exists; choose another name") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StoreError(f"{path} cannot be written ({reason}); choose another name") from error


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


def turn_visibility(session: StoredSession) -> dict[int, Literal["seen", "partly", "forgotten"]]:
    """Return how much of each turn is cached, by turn number; sinks do not count."""
    sinks = _sinks(session)
    answer: dict[int, Literal["seen", "partly", "forgotten"]] = {}
    for turn in session.turns:
        first, stop = max(turn.start, sinks), turn.start + len(turn.ids)
        cached = sum(max(0, min(stop, b) - max(first, a)) for a, b in session.info.held)
        answer[turn.number] = "seen" if cached >= stop - first else "partly" if cached > 0 else "forgotten"
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
    seen = turn_visibility(session)
    forgotten_before = any(state == "forgotten" for state in seen.values())
    edge = next(
        (turn.number for turn in session.turns if seen[turn.number] != "forgotten" and not _is_pinned(session, turn)),
        None,
    )
    for turn in session.turns:
        if turn.number == edge and (forgotten_before or seen[turn.number] == "partly"):
            yield ""
            yield "---"
            yield ""
            yield "*The model's context starts here: it no longer sees the turns above, except pinned ones.*"
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
    """Yield the answer, preceded by the reasoning as a quotation unless it is hidden."""
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


# --- import -----------------------------------------------------------------------------------------------------


class ImportedSession:
    """A session read from a file."""

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
    """Return the settings that this version accepts. Unknown ones are ignored, so that the import still works."""
    settings: dict[str, Any] = {}
    for name, value in given.items() if isinstance(given, dict) else ():
        if name in setting_fields():
            with suppress(ConfigError):
                settings[name] = check_value(name, value, "the file")
    return settings


def read_export(path: Path) -> ImportedSession:
    """Read a file written by `export(..., 'jsonl')` or 'replay', or one conversation in a format of `transcripts`.

    Raises:
        StoreError: The file or one of its records cannot be read; the message has the line.
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
        raise StoreError(f"{path} is plain text, not JSON; nothing was imported")
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
                    _add_message(role, content, time.time(), head, messages)
            elif kind == "messages" and "streamchat" in value:
                conversations += 1
                head = _head(value, path)
            elif kind == "messages":
                _add_message(*message_of(value), _moment(value.get("at")), head, messages)
            else:
                raise TranscriptError(unknown(value) if kind is None else "it has only user messages")
        except TranscriptError as error:
            raise StoreError(f"{path}, line {record.line}: {error}; nothing was imported") from None
    if conversations > 1:
        raise StoreError(f"{path} has {conversations} conversations; give a file with only one; nothing was imported")
    turns = _turns(messages)
    if not turns:
        raise StoreError(f"{path} has no messages; give a file that `streamchat sessions export` wrote")
    return ImportedSession(head or {"title": path.stem}, turns)


def _head(record: dict[str, Any], path: Path) -> dict[str, Any]:
    if record["streamchat"] != VERSION:
        raise StoreError(f"{path}: unknown format {record['streamchat']}; this streamchat reads format {VERSION}")
    return record


def _add_message(
    role: Role, content: str, at: float, head: dict[str, Any], messages: list[tuple[Role, str, float]]
) -> None:
    content = clean(content)
    if role != "system":
        messages.append((role, content, at))
        return
    settings = head.get("settings")
    head["settings"] = {**(settings if isinstance(settings, dict) else {}), "system_prompt": content}


def _moment(at: Any) -> float:
    """Return `at` if it is a time in seconds since 1970, else the current time."""
    legal = isinstance(at, int | float) and not isinstance(at, bool) and 0 <= at <= LATEST
    return float(at) if legal else time.time()


def _turns(messages: list[tuple[Role, str, float]]) -> list[StoredTurn]:
    """Pair user and assistant messages. Consecutive messages of one role are joined; a missing one is empty."""
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
