"""Turns the conversations of a file into sessions; refuses the whole file if one of them cannot be read."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import Any, get_args

from streamchat.base.errors import ConfigError, StoreError
from streamchat.base.events import FinishReason
from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.sanitize import one_line
from streamchat.base.text_files import read_text
from streamchat.sessions.settings import valid_settings
from streamchat.sessions.transcripts.export import VERSION
from streamchat.sessions.transcripts.messages import Message, Transcript, TranscriptError, short_json
from streamchat.sessions.transcripts.reader import TranscriptFile, read_transcripts
from streamchat.sessions.transcripts.values import scalar_in
from streamchat.store.records import MAX_TITLE, ModelIdentity, NewSession, StoredTurn, clean
from streamchat.store.rows import LATEST

MAX_BYTES = 1_000_000_000
"""Maximum size of a file. Reading takes several times its size in memory."""
FINISH_REASONS = get_args(FinishReason)


class ImportedSession:
    """A session read from a file.

    Args:
        transcript: The conversation.
        title: Its title if the file gives none.
    """

    def __init__(self, transcript: Transcript, title: str) -> None:
        about = transcript.about
        self.title = _shown(_text(about, "title")) or _shown(clean(title)) or "imported"
        self.model = _text(about, "model") or "default"
        # others are ignored, so that the import still works
        settings = about.get("settings")
        self.settings = valid_settings(settings, "the file") if isinstance(settings, dict) else {}
        self.settings.pop("adapter", None)  # a path of another machine, to which this user did not agree
        self.model_name = _shown(_text(about, "model_name")) or self.model
        system = [message.text for message in transcript.messages if message.role == "system"]
        if system:
            self.settings |= valid_settings({"system_prompt": clean(system[-1])}, "the file")
        self.turns = _turns([message for message in transcript.messages if message.role != "system"])
        self.skipped = transcript.skipped
        """What has no text and was skipped: singular noun -> number."""

    def as_new(self) -> NewSession:
        """Return what the store creates.

        It has no fingerprints: a resume tokenizes its texts.
        """
        return NewSession(self.title, ModelIdentity(self.model, self.model_name), self.settings, tuple(self.turns))


def read_sessions(path: Path) -> list[ImportedSession]:
    """Read all conversations of a file that have messages: one or more.

    Raises:
        StoreError: The file or one of its records cannot be read; the message has the line.
    """
    try:
        text = read_text(path, max_bytes=MAX_BYTES).text
        file = read_transcripts(text, skip_media=True)
        _check(file, text)
    except ConfigError as error:
        raise StoreError(f"{error}; nothing was imported") from None
    except TranscriptError as error:
        where = f"{path}, line {error.line}" if error.line else f"{path}"
        raise StoreError(f"{where}: {error}; nothing was imported") from None
    is_one = len(file.transcripts) == 1
    starts = [path.stem if is_one else _start_of(each) or path.stem for each in file.transcripts]
    sessions = list(map(ImportedSession, file.transcripts, starts))
    if not (kept := [session for session in sessions if session.turns]):
        raise StoreError(f"{path} has no messages; give a file that `streamchat sessions export` wrote")
    for empty in sessions:  # what was all of a conversation is counted, too
        if not empty.turns:
            kept[-1].skipped.update(empty.skipped)
    return kept


def choose_sessions(sessions: list[ImportedSession], wanted: str) -> list[ImportedSession]:
    """Return the conversations that `wanted` names: the one with this number, or all whose title contains it.

    A title that equals `wanted` precedes titles that contain it, and case does not matter.

    Args:
        sessions: All conversations of a file.
        wanted: A number, from 1, or a part of a title.

    Raises:
        StoreError: There is none.
    """
    number = parse_whole_number(wanted)
    if number is not None and 1 <= number <= len(sessions):
        return [sessions[number - 1]]
    word = wanted.strip().casefold()
    titles = [session.title.casefold() for session in sessions]
    found = [session for session, title in zip(sessions, titles, strict=True) if word and title == word]
    if not found:
        found = [session for session, title in zip(sessions, titles, strict=True) if word and word in title]
    if not found and number is not None:
        raise StoreError(f"there is no conversation {number}; the file has {plural(len(sessions), 'conversation')}")
    if not found:
        raise StoreError(f"no conversation of the file has {wanted!r} in its title")
    return found


def _check(file: TranscriptFile, text: str) -> None:
    """Raise `TranscriptError` unless every record is part of a conversation with replies."""
    if file.kind == "text" and file.transcripts:
        scalar = scalar_in(text)
        raise TranscriptError(scalar or "it is plain text, not JSON", 1 if scalar else 0)
    if file.problems:
        line, reason = file.problems[0]
        raise TranscriptError(reason, line)
    for transcript in file.transcripts:
        if file.kind == "mt-bench":
            raise TranscriptError("it has only user messages", transcript.line)
        if (version := transcript.about.get("streamchat", VERSION)) != VERSION:
            raise TranscriptError(f"unknown format {short_json(version)}; this streamchat reads format {VERSION}")


def _start_of(transcript: Transcript) -> str:
    """Return the first line of the conversation, which tells it from others of its file."""
    texts = (message.text.strip() for message in transcript.messages if message.role != "system")
    return next((text.splitlines()[0] for text in texts if text), "")


def _shown(text: str) -> str:
    """Return a title or a name on one line, cut to the length of a title; '' if it has no visible character."""
    line = " ".join(text[: 4 * MAX_TITLE].split())
    line = line if len(line) <= MAX_TITLE else f"{line[: MAX_TITLE - 1].rstrip()}…"
    return line if one_line(line) else ""


def _text(about: dict[str, Any], name: str) -> str:
    value = about.get(name)
    return clean(value) if isinstance(value, str) else ""


def _moment(at: Any) -> float:
    """Return `at` if it is a time in seconds since 1970, else the current time."""
    legal = isinstance(at, int | float) and not isinstance(at, bool) and 0 <= at <= LATEST
    return float(at) if legal else time.time()


def _turns(messages: list[Message]) -> list[StoredTurn]:
    """Pair user and assistant messages. Consecutive messages of one role are joined; a missing one is empty."""
    turns: list[StoredTurn] = []
    last = ""
    for message in messages:
        role, content, at = message.role, clean(message.text), _moment(message.at)
        if role == "user" and last == "user":
            turns[-1].text += "\n\n" + content
        elif role == "user" or not turns:
            text, reply = (content, "") if role == "user" else ("", content)
            turns.append(StoredTurn(len(turns) + 1, text, reply, 0, 0, 0, array("i"), started=at, finished=at))
        else:
            turns[-1].reply += ("\n\n" if turns[-1].reply else "") + content
        if role == "assistant" and message.finish_reason in FINISH_REASONS:
            turns[-1].finish_reason = message.finish_reason
        last = role
    return turns
