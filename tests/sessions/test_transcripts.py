"""Conversations of data sets: what is read, and that JSON is never taken for text."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.cli import main as cli
from streamchat.replay.script import read_scripts
from streamchat.sessions.transcripts.formats import FORMATS, KINDS, unknown
from streamchat.sessions.transcripts.imported import ImportedSession, read_sessions
from streamchat.sessions.transcripts.messages import Message, Transcript, TranscriptError, message_of
from streamchat.sessions.transcripts.values import Record, read_records
from streamchat.store.store import Store

SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Name a color."},
        {"from": "gpt", "value": "Blue."},
    ]
}
PARTS = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Name"}, {"type": "text", "text": "a color."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Blue."}]},
    ]
}
TOOLS = {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "c1"}]}]}


def said(path: Path) -> tuple[list[tuple[str | None, list[tuple[str, str | None]]]], list[str]]:
    """(system prompt, turns) of each dialogue, and the problems."""
    script = read_scripts([path])
    dialogues = [(d.system, [(turn.text, turn.reply) for turn in d.turns]) for d in script.dialogues]
    return dialogues, [problem.removeprefix(f"{path}") for problem in script.problems]


def put(tmp_path: Path, text: str, name: str = "talk.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("shape", ["lines", "array", "object"])
@pytest.mark.parametrize("record", [SHAREGPT, PARTS])
def test_every_shape_of_file(tmp_path: Path, record: Any, shape: str, indent: int | None) -> None:
    count = 1 if shape == "object" else 3
    if shape == "array":
        text = json.dumps([record] * count, indent=indent)
    elif shape == "lines":
        text = "\n\n".join([json.dumps(record)] * count)
    else:
        text = "\ufeff\n " + json.dumps(record, indent=indent)
    color = "Name\na color." if record is PARTS else "Name a color."
    assert said(put(tmp_path, text)) == ([("Be brief.", [(color, "Blue.")])] * count, [])


def test_an_array_of_messages_is_one_conversation(tmp_path: Path) -> None:
    for messages in (SHAREGPT["conversations"], [{"role": "user", "content": "Name a color."}]):
        dialogues, problems = said(put(tmp_path, json.dumps(messages, indent=2)))
        assert [turns[0][0] for _, turns in dialogues] == ["Name a color."]
        assert problems == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"prompt": "a", "completion": "b"}\n', 'it is JSON, an object with "prompt", "completion"; accepted '),
        ('[{"title": "t", "mapping": {}}]', 'it is JSON, an object with "title", "mapping"; accepted formats: '),
        ('{\n "a": 1,\n "b": 2\n}', 'it is JSON, an object with "a", "b"; accepted formats: '),
        ("{}", "it is JSON, an object with no keys; accepted formats: "),
        ('["a", "b"]', "it is JSON, a string; accepted formats: "),
        ("[[1]]", "it is JSON, a list; accepted formats: "),
        ('{"messages": [\n{"role": "user"', "it starts like JSON but is invalid: line 2, column 16: "),
        ("[intro] hello", "it starts like JSON but is invalid: line 1, column 2: "),
        ("[" * 100_000, "it starts like JSON but is invalid: it is nested too deeply; give `--format text`"),
    ],
)
def test_json_is_never_said_to_the_model(
    tmp_path: Path, text: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_scripts([path])
    assert str(raised.value).startswith(f"{path}: {found}")
    assert cli.main(["replay", str(path)]) == ExitCode.USAGE
    err = capsys.readouterr().err
    assert found in err
    assert err.count("\n") == 1


def test_text_that_is_not_json_stays_text(tmp_path: Path) -> None:
    assert said(put(tmp_path, 'Say {"a": 1}\n"Hello," she said.\n{"a": 1}\n')) == (
        [(None, [('Say {"a": 1}', None), ('"Hello," she said.', None), ('{"a": 1}', None)])],
        [],
    )
    assert said(put(tmp_path, "\n \n")) == ([], [])


def test_lines_of_several_kinds_are_told_with_their_number(tmp_path: Path) -> None:
    rows = [SHAREGPT, {"turns": ["a"]}, TOOLS, "prose", PARTS, {"other": 1}]
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    dialogues, problems = said(put(tmp_path, text))
    assert len(dialogues) == 2
    assert problems[0] == ":2: this record has the format mt-bench, but the file has conversations"
    assert problems[1] == ':3: a message from assistant has "tool_calls", which cannot be replayed'
    assert problems[2].startswith(":4: this is not JSON (")
    assert problems[3].startswith(':6: it is JSON, an object with "other"; accepted formats: ')
    assert len(problems) == 4
    dialogues, problems = said(put(tmp_path, "A preface\n" + json.dumps(PARTS)))
    assert (len(dialogues), [problem.partition(" (")[0] for problem in problems]) == (1, [":1: this is not JSON"])


def test_items_of_an_array_are_told_with_their_line(tmp_path: Path) -> None:
    text = json.dumps([PARTS, TOOLS, SHAREGPT], indent=1)
    line = text[: text.index('"tool_calls"')].count("\n") - 4
    dialogues, problems = said(put(tmp_path, text))
    assert len(dialogues) == 2
    assert problems == [f':{line}: a message from assistant has "tool_calls", which cannot be replayed']


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"from": "tool", "value": "x"}, 'unknown role "tool"; known roles are system, developer, user, human, '),
        ({"role": "tool", "content": "x"}, 'unknown role "tool"'),
        ({"role": ["user"], "content": "x"}, 'unknown role ["user"]'),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, 'has a part of type "image_url"'),
        ({"role": "user", "content": [7]}, "has a part of type null"),
        ({"role": "user", "content": [{"type": "text"}]}, 'has a part of type "text"'),
        ({"role": "user", "content": {"a": 1}}, "must be a string, not an object"),
        ({"role": "assistant", "content": None}, "must be a string, not null"),
        ({"role": "user"}, 'a message needs "role" and "content"'),
        ("hello", 'a message needs "role" and "content"'),
    ],
)
def test_what_cannot_be_kept_is_refused(message: Any, reason: str) -> None:
    with pytest.raises(TranscriptError) as raised:
        message_of(message)
    assert reason in str(raised.value)


@pytest.mark.parametrize(("key", "value"), [("tools", [{"name": "f"}]), ("tools", '[{"name": "f"}]'), ("system", 7)])
def test_what_belongs_to_the_record_is_not_left_out(tmp_path: Path, key: str, value: Any) -> None:
    dialogues, problems = said(put(tmp_path, json.dumps({**SHAREGPT, key: value})))
    assert (dialogues, len(problems)) == ([], 1)
    dialogues, problems = said(
        put(tmp_path, json.dumps({"system": "Be kind.", "conversations": [SHAREGPT["conversations"][1]]}))
    )
    assert (dialogues[0][0], problems) == ("Be kind.", [])


@pytest.mark.parametrize("record", [SHAREGPT, PARTS])
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [value]])
def test_import_reads_the_same(tmp_path: Path, record: Any, wrap: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(tmp_path, json.dumps(wrap(record), indent=2), "colors.json")
    assert cli.main(["sessions", "import", str(path)]) == ExitCode.OK
    with Store() as store:
        session = store.load(store.find("last").id)
    assert [(turn.text.replace("\n", " "), turn.reply) for turn in session.turns] == [("Name a color.", "Blue.")]
    assert session.info.settings["system_prompt"] == "Be brief."
    assert session.info.title == "colors"


def test_records_know_their_lines() -> None:
    assert read_records('\n{"a": 1}\n\n{"b": 2}') == [Record(2, {"a": 1}), Record(4, {"b": 2})]
    items = [(3, {"a": 1}), (3, {"b": 2}), (5, 3)]
    expected = [Record(line, value, number=number) for number, (line, value) in enumerate(items, 1)]
    assert read_records('[\n\n{"a": 1}, {"b":\n 2},\n3]') == expected
    assert read_records("[]") == []
    assert read_records("plain") is None


def test_a_message_that_cannot_be_used_is_said_with_its_line(tmp_path: Path) -> None:
    late = {"messages": [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Hello"}]}
    path = put(tmp_path, "\n".join([json.dumps(PARTS), "", json.dumps(late)]))
    assert said(path)[1] == [":3: it starts with an assistant message, which was skipped"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1 2]", "line 1, column 4: Expecting ',' delimiter"),
        ('[{"a": 1}', "line 1, column 10: Expecting ',' delimiter"),
        ('[{"a": 1}] x', "line 1, column 12: Extra data"),
        ("[1\n2\n]", "line 2, column 1: Expecting ',' delimiter"),
        ("[", "line 1, column 2: Expecting value"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[" + "9" * 5000 + "]", "a number has too many digits"),
        ('{"messages": ' + "9" * 5000 + "}", "a number has too many digits"),
    ],
)
def test_invalid_json_is_said_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(TranscriptError) as refused:
        read_records(text)
    assert str(refused.value) == f"it starts like JSON but is invalid: {reason}"


def test_a_large_array_on_one_line_is_in_memory_once() -> None:
    text = json.dumps([{"turns": ["x" * 1_000_000]} for _ in range(10)])
    tracemalloc.start()
    records = read_records(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records or ()) == 10
    assert peak < 2.5 * len(text)  # the values, and the line in the list of lines


def test_pictures_are_named_by_an_import_and_refuse_a_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Part of a script would be another conversation; a saved one is for reading, too."""
    parts = [{"type": "text", "text": "What is it?"}, *[{"type": "image_url", "image_url": {"url": "x"}}] * 2]
    messages = [{"role": "user", "content": [*parts, {"type": "input_audio"}]}, {"role": "assistant", "content": "A"}]
    path = put(tmp_path, json.dumps({"messages": messages}))
    dialogues, problems = said(path)
    assert (dialogues, len(problems)) == ([], 1)
    assert 'has a part of type "image_url"; only text can be replayed' in problems[0]
    assert cli.main(["sessions", "import", str(path)]) == ExitCode.OK
    assert capsys.readouterr().err == "streamchat: only text can be imported; skipped: 2 images, 1 audio recording\n"
    with Store() as store:
        [turn] = store.load(store.find("last").id).turns
    assert turn.text == "What is it?\n[image]\n[image]\n[audio recording]"


def test_messages_without_replies_are_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(tmp_path, '{"turns": ["What is it?", "And why?"]}\n')
    assert cli.main(["sessions", "import", str(path)]) == ExitCode.STORE
    assert "it has only user messages" in capsys.readouterr().err


def test_every_kind_of_part_without_text_is_named(tmp_path: Path) -> None:
    kinds = ["image_url", "input_image", "image", "input_audio", "audio", "file", "input_file"]
    rows = [{"role": "user", "content": [{"type": kind} for kind in kinds]}, {"role": "assistant", "content": "A"}]
    [session] = read_sessions(put(tmp_path, json.dumps({"messages": rows})))
    names = ["image", "image", "image", "audio recording", "audio recording", "file", "file"]
    assert session.turns[0].text.split("\n") == [f"[{name}]" for name in names]
    assert session.skipped == {"image": 3, "audio recording": 2, "file": 2}


@pytest.mark.parametrize("name", ["assistant", "gpt", "chatgpt", "bing", "bard", "model"])
def test_every_name_of_the_model_is_known(name: str) -> None:
    assert message_of({"from": name, "value": "Paris."}) == Message("assistant", "Paris.")


def test_a_session_without_any_word_for_its_title_is_called_imported(tmp_path: Path) -> None:
    rows = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A"}]
    assert ImportedSession(Transcript([Message("user", "Hello")]), "").title == "imported"
    [session] = read_sessions(put(tmp_path, json.dumps({"title": " \t", "messages": rows}), "talk.json"))
    assert session.title == "talk"


def test_the_times_of_messages_are_kept(tmp_path: Path) -> None:
    rows = [{"role": "user", "content": "a", "at": 1.5}, {"role": "assistant", "content": "b", "at": True}]
    for text in (json.dumps({"messages": rows}), "\n".join(map(json.dumps, rows))):
        [session] = read_sessions(put(tmp_path, text))
        assert session.turns[0].started == 1.5
    rows[0]["at"] = float("nan")
    [session] = read_sessions(put(tmp_path, json.dumps({"messages": rows})))
    assert session.turns[0].started == pytest.approx(time.time(), abs=60)


def test_each_header_starts_a_session(tmp_path: Path) -> None:
    rows = [
        {"streamchat": 1, "title": "one"},
        {"role": "user", "content": "a"},
        {"streamchat": 1, "title": "two", "settings": {"system_prompt": "S"}},
        {"role": "user", "content": "b"},
    ]
    path = put(tmp_path, "\n".join(map(json.dumps, rows)))
    assert [(session.title, session.turns[0].text) for session in read_sessions(path)] == [("one", "a"), ("two", "b")]
    assert said(path) == ([(None, [("a", None)]), ("S", [("b", None)])], [])


def test_the_docs_and_the_messages_list_every_format() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "replay.md").read_text(encoding="utf-8")
    for each in FORMATS:
        assert f"| `{each.name}` | `{each.record.replace(' or ', '` or `')}` | {each.what} |" in docs
        assert each.record in unknown(None)
    assert [name for name in KINDS if f"| `{name}` |" not in docs] == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_and_line_end(tmp_path: Path, encoding: str, end: str) -> None:
    path = tmp_path / "talk.json"
    said_in_file = "gr\u00fc\u00df \u2028 \U0001f600"
    row = {"messages": [{"role": "user", "content": said_in_file}, {"role": "assistant", "content": "b"}]}
    for text in (json.dumps([row, row], ensure_ascii=False, indent=1), "\n".join([json.dumps(row)] * 2)):
        path.write_bytes(text.replace("\n", end).encode(encoding, "surrogatepass"))
        dialogues, problems = said(path)
        assert (len(dialogues), problems) == (2, [])
        assert [session.turns[0].text for session in read_sessions(path)] == [said_in_file] * 2
