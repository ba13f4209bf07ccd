"""Parts of reading a transcript: names of values, tools, formats, moments."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streamchat.sessions.transcripts.imported import read_sessions
from streamchat.sessions.transcripts.messages import TranscriptError, message_of, short_json, type_name
from streamchat.sessions.transcripts.reader import read_transcripts


def test_a_value_is_shown_up_to_forty_characters() -> None:
    assert short_json("x" * 38) == f'"{"x" * 38}"'
    assert short_json("x" * 39) == f'"{"x" * 36}...'
    assert short_json({"a": None}) == '{"a": null}'


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "null"),
        ({}, "an object"),
        ([], "a list"),
        ("", "a string"),
        (True, "true or false"),
        (1, "a number"),
        (1.5, "a number"),
    ],
)
def test_a_value_has_a_name(value: Any, name: str) -> None:
    assert type_name(value) == name


@pytest.mark.parametrize("role", ["tool", "function", "function_call", "function_response", "observation"])
def test_messages_of_tools_are_skipped_or_refused(role: str) -> None:
    skipped = Counter[str]()
    assert message_of({"from": role, "value": "x"}, skipped) is None
    assert skipped == {"tool message": 1}
    with pytest.raises(TranscriptError):
        message_of({"from": role, "value": "x"})


def test_json_is_text_if_text_is_wanted() -> None:
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    assert read_transcripts(line).kind != "text"
    file = read_transcripts(line, "text")
    assert (file.kind, [message.text for message in file.transcripts[0].messages]) == ("text", [line])


@pytest.mark.parametrize(
    ("at", "is_known"), [(0, True), (1.5, True), (-1, False), (True, False), ("1", False), (1e30, False)]
)
def test_a_moment_is_in_seconds_since_1970(at: Any, is_known: bool, tmp_path: Path) -> None:
    rows = [{"role": "user", "content": "a", "at": at}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": rows}), encoding="utf-8")
    [session] = read_sessions(path)
    assert (session.turns[0].started == at) == is_known
