"""ChatGPT's data export: what is read of a tree of messages, what is named as skipped, and damaged trees."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ExitCode, StoreError
from streamchat.cli import main as cli
from streamchat.replay.script import read_scripts
from streamchat.sessions.transcripts.chatgpt import conversation_of
from streamchat.sessions.transcripts.imported import read_sessions
from streamchat.sessions.transcripts.messages import Message, TranscriptError
from streamchat.store.store import Store


def node(parent: str | None, role: str, *parts: Any, kind: str = "text", **more: Any) -> dict[str, Any]:
    """A node with one message."""
    content = {"content_type": kind, "parts": list(parts)}
    return {"parent": parent, "message": {"author": {"role": role}, "content": content, "recipient": "all", **more}}


def chat(**nodes: dict[str, Any]) -> dict[str, Any]:
    """A conversation whose shown path ends at its last node."""
    return {
        "title": "A trip",
        "mapping": {"root": {"parent": None, "message": None}, **nodes},
        "current_node": list(nodes)[-1],
        "default_model_slug": "gpt-4o",
    }


TRIP = chat(
    hidden=node("root", "system", "", metadata={"is_visually_hidden_from_conversation": True}),
    system=node("hidden", "system", "Be brief."),
    ask=node("system", "user", "Name a city.", create_time=1_700_000_000.5),
    other=node("ask", "assistant", "Rome."),
    city=node("ask", "assistant", "Paris.", create_time=1_700_000_002.0),
    picture=node("city", "user", {"content_type": "image_asset_pointer", "asset_pointer": "file-service://x"},
                 "And this?", kind="multimodal_text"),
    thinks=node("picture", "assistant", kind="thoughts"),
    calls=node("thinks", "assistant", "search()", kind="code", recipient="browser"),
    tool=node("calls", "tool", "found it", kind="execution_output"),
    reply=node("tool", "assistant", "The Eiffel", " Tower."),
    voice=node("reply", "user", {"content_type": "audio_transcription", "text": "How high?"},
               {"content_type": "audio_asset_pointer"}, kind="multimodal_text"),
    high=node("voice", "assistant", "330 m."),
)  # fmt: skip
SAID = [
    ("Name a city.", "Paris."),
    ("[image]\nAnd this?", "The Eiffel\n Tower."),
    ("How high?\n[audio recording]", "330 m."),
]
SKIPPED = "2 tool messages, 1 image, 1 reasoning message, 1 audio recording, 1 alternative message"
TWICE = "4 tool messages, 2 images, 2 reasoning messages, 2 audio recordings, 2 alternative messages"


def put(tmp_path: Path, value: Any, name: str = "conversations.json") -> Path:
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_the_shown_path_is_read_and_the_rest_is_counted() -> None:
    read = conversation_of(TRIP)
    assert read.messages[:3] == [
        Message("system", "Be brief."),
        Message("user", "Name a city.", at=1_700_000_000.5),
        Message("assistant", "Paris.", at=1_700_000_002.0),
    ]
    assert read.about == {"title": "A trip", "model_name": "gpt-4o"}
    named = ("tool message", "image", "reasoning message", "audio recording", "alternative message")
    assert read.skipped == Counter(dict(zip(named, (2, 1, 1, 1, 1), strict=True)))


def test_an_empty_message_is_named_unless_it_is_of_a_kind_that_has_text() -> None:
    kinds = ("text", "multimodal_text", "computer_output")
    nodes = {f"n{i}": node(f"n{i - 1}" if i else "root", "assistant", "", kind=kind) for i, kind in enumerate(kinds)}
    assert conversation_of(chat(**nodes)).skipped == {'"computer_output" message': 1}


def test_an_export_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(tmp_path, [TRIP, {**TRIP, "title": "Again"}, chat(one=node("root", "user", ""))])
    assert cli.main(["sessions", "import", str(path)]) == ExitCode.STORE
    assert (
        "has 2 conversations; --all imports each as a session, --pick N or --pick TITLE some" in capsys.readouterr().err
    )
    assert cli.main(["sessions", "import", str(path), "--all"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert out.count("3 turns were imported") == 2
    assert err == f"streamchat: only text can be imported; skipped: {TWICE}\n"
    with Store() as store:
        assert sorted(info.title for info in store.sessions()) == ["A trip", "Again"]
        session = store.load(store.find("last").id)
    assert [(turn.text, turn.reply) for turn in session.turns] == SAID
    assert session.turns[0].started == 1_700_000_000.5
    assert session.info.settings == {"system_prompt": "Be brief."}
    # foreign, and no model is loaded because a file names it
    assert (session.info.model, session.info.model_name, session.info.is_imported) == ("default", "gpt-4o", True)
    assert cli.main(["sessions", "show", "last"]) == ExitCode.OK
    assert f"{session.info.id}, gpt-4o, started " in capsys.readouterr().out  # no dtype: no model was loaded


def test_an_export_is_replayed(tmp_path: Path) -> None:
    path = put(tmp_path, json.dumps([TRIP, TRIP], indent=1))
    script = read_scripts([path])
    second = path.read_text().count("\n", 0, path.read_text().rindex('{\n  "title"')) + 1
    for dialogue, line in zip(script.dialogues, (2, second), strict=True):
        assert [(turn.text, turn.reply) for turn in dialogue.turns] == SAID
        assert dialogue.system == "Be brief."
        assert dialogue.place == f"{path}:{line}"
    assert script.problems == [f"{path}:{line}: {SKIPPED} (only text can be replayed)" for line in (2, second)]
    one = put(tmp_path, TRIP, "one.json")
    assert len(read_scripts([one], "chatgpt").dialogues) == 1
    assert read_scripts([one]).dialogues[0].turns == script.dialogues[0].turns


def test_a_long_conversation_on_one_line_is_read(tmp_path: Path) -> None:
    nodes = {"n0": node("root", "user", "x" * 5_000_000)}
    for number in range(1, 5000):
        nodes[f"n{number}"] = node(f"n{number - 1}", "user" if number % 2 == 0 else "assistant", f"text {number}")
    [session] = read_sessions(put(tmp_path, chat(**nodes)))
    assert len(session.turns) == 2500
    assert session.turns[-1].reply == "text 4999"


ODD: list[tuple[dict[str, Any], str]] = [
    ({"mapping": []}, '"mapping" must be an object'),
    ({"current_node": "gone"}, 'its "mapping" has no node "gone"'),
    ({"current_node": ["high"]}, 'its "mapping" has no node ["high"]'),
    ({"mapping": {"high": {"parent": "high"}}}, 'its "mapping" has a cycle at the node "high"'),
    ({"mapping": {"high": {"parent": "b"}, "b": {"parent": "high"}}}, 'its "mapping" has a cycle at the node "high"'),
    ({"mapping": {"high": 7}}, 'its "mapping" has no node "high"'),
    ({"mapping": {"high": node("gone", "user", "a")}}, 'its "mapping" has no node "gone"'),
    ({"mapping": {"high": node(None, "robot", "a")}}, 'unknown role "robot"; known roles are system, '),
]


@pytest.mark.parametrize(("harm", "reason"), ODD)
def test_a_damaged_tree_is_refused_with_its_line(tmp_path: Path, harm: dict[str, Any], reason: str) -> None:
    with pytest.raises(TranscriptError) as raised:
        conversation_of({**TRIP, **harm})
    assert str(raised.value).startswith(reason)
    path = put(tmp_path, f"[\n{json.dumps(TRIP)},\n{json.dumps({**TRIP, **harm})}\n]")
    with pytest.raises(StoreError) as refused:
        read_sessions(path)
    assert str(refused.value).startswith(f"{path}, line 3: {reason}")
    script = read_scripts([path])
    assert len(script.dialogues) == 1
    assert script.problems[-1].startswith(f"{path}:3: {reason}")


@pytest.mark.parametrize(
    ("message", "said", "skipped"),
    [
        (7, [], {}),
        ({"author": 7, "metadata": {"is_visually_hidden_from_conversation": True}}, [], {}),
        ({"author": {"role": "user"}, "content": None}, [], {"null message": 1}),
        ({"author": {"role": "user"}, "content": {"content_type": "text", "parts": "a"}}, [], {}),
        ({"author": {"role": "user"}, "content": {"content_type": "text", "text": "a"}}, ["a"], {}),
        ({"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["a", None]}}, ["a"], {}),
        ({"author": {"role": "user"}, "content": {"content_type": "text", "parts": [7]}}, ["[file]"], {"file": 1}),
        (
            {"author": {"role": "user"}, "content": {"content_type": "user_editable_context", "user_profile": "a"}},
            [],
            {'"user_editable_context" message': 1},
        ),
        ({"author": {"role": "assistant"}, "content": {"content_type": "code", "text": "x = 1"}}, ["x = 1"], {}),
    ],
)
def test_odd_messages(message: Any, said: list[str], skipped: dict[str, int]) -> None:
    read = conversation_of({"mapping": {"one": {"message": message}}, "current_node": "one"})
    assert [message.text for message in read.messages] == said
    assert read.skipped == Counter(skipped)


def test_without_a_current_node_the_path_ends_at_the_last_message() -> None:
    read = conversation_of({**TRIP, "current_node": None})
    assert read.messages == conversation_of(TRIP).messages
    assert read.skipped == conversation_of(TRIP).skipped


def test_of_many_conversations_on_one_line_the_damaged_one_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, [TRIP, TRIP, {**TRIP, "current_node": "gone"}])
    with pytest.raises(StoreError, match=r'line 1: item 3: its "mapping" has no node "gone"; nothing was imported$'):
        read_sessions(path)
    assert f'{path}:1: item 3: its "mapping" has no node "gone"' in map(str, read_scripts([path]).problems)


@pytest.mark.parametrize(
    ("title", "shown"),
    [("x" * 2_000_000, f"{'x' * 199}…"), ("a\n" * 99, "a " * 98 + "a"), ("\u200b", "chats"), ({"a": 1}, "chats")],
)
def test_a_title_is_one_line_of_the_length_of_a_title(tmp_path: Path, title: Any, shown: str) -> None:
    [session] = read_sessions(put(tmp_path, {**TRIP, "title": title, "default_model_slug": title}, "chats.json"))
    assert session.title == shown
    assert session.model_name == ("default" if shown == "chats" else shown)


def test_a_conversation_without_text_is_counted(tmp_path: Path) -> None:
    tools = chat(one=node("root", "tool", "found it"), two=node("one", "tool", "again"))
    [session] = read_sessions(put(tmp_path, [chat(one=node("root", "user", "a")), tools]))
    assert session.skipped == Counter({"tool message": 2})


def test_an_empty_conversation_has_no_messages(tmp_path: Path) -> None:
    path = put(tmp_path, {**TRIP, "mapping": {}, "current_node": None})
    with pytest.raises(StoreError, match="has no messages"):
        read_sessions(path)
    assert read_scripts([path]).problems[-1] == f"{path}:1: it contains no user messages"
