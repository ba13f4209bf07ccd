"""Exports word for word, and the sentences about figures, evictions and the cache that they contain."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from typing import Any

import pytest

from streamchat.base.thinking import ONLY_REASONING
from streamchat.sessions.transcripts import export as module
from streamchat.sessions.transcripts.context import fork_sentence, recalled_text, recalled_turns, token_runs
from streamchat.sessions.transcripts.export import FORMATS, export
from streamchat.sessions.transcripts.formats import ACCEPTED, format_of, unknown
from streamchat.sessions.transcripts.formats import FORMATS as RECORDS
from streamchat.sessions.transcripts.html_page import (
    _eviction_text,
    _figures,
    _settings,
    _summary,
    _turns,
    is_safe_link,
    markdown_html,
)
from streamchat.sessions.transcripts.messages import TranscriptError
from streamchat.sessions.transcripts.reader import read_transcripts
from streamchat.store.records import SessionInfo, StoredEviction, StoredSession, StoredTurn


def a_turn(number: int, text: str = "", reply: str = "", **changes: Any) -> StoredTurn:
    """Turn `number` with the log indices 10 number to 10 number + 9."""
    at = 10 * number
    turn = StoredTurn(number, text, reply, at, at + 1, at + 5, array("i", [7] * 10), started=1000.0 + number)
    return replace(turn, **changes)


def a_session(*turns: StoredTurn, settings: dict[str, Any] | None = None, **changes: Any) -> StoredSession:
    """A session in which the model sees the sinks and everything from index 25 on."""
    info = SessionInfo("s1", "The *sea*", 100.0, 200.0, "/m/tiny", "tiny_2", "float32", "f", "t", settings or {})
    known: dict[str, Any] = {"held": ((0, 4), (25, 50)), "compressions": 3}
    return StoredSession(replace(info, **(known | changes)), array("i", [1] * 10), turns)


THREE = (
    a_turn(1, "Hello *you*", "Hi."),
    a_turn(2, "Why?", "<think>hm\n\nso</think>Because.", stats={"recalled": [1]}),
    a_turn(3, "And?", "", finish_reason="cancelled", stats={"recalled": [1, 2]}),
)


@pytest.fixture(autouse=True)
def dates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_date", lambda then: f"day {then:g}")
    monkeypatch.setattr("streamchat.sessions.transcripts.html_page._date", lambda then: f"day {then:g}")


def test_markdown_word_for_word() -> None:
    settings = {"system_prompt": "Be *kind*.", "num_sink_tokens": 4}
    session = a_session(*THREE, settings=settings, parent="s0", parent_turn=2, pins=((30, 40),))
    assert export(session, "markdown") == (
        "# The \\*sea\\*\n\n"
        "tiny\\_2, day 100 to day 200, 3 turns\n\n"
        "Fork of session s0 at turn 2.\n\n"
        "## System prompt\n\nBe *kind*.\n\n"
        "## 1. You\n\nHello *you*\n\n## 1. tiny\\_2\n\nHi.\n\n"
        "---\n\n*The model's context starts here: it no longer sees the turns above, except pinned ones.*\n\n---\n\n"
        "## 2. You\n\nWhy?\n\n## 2. tiny\\_2\n\n*(turn 1 was back in context)*\n\n"
        "> *Reasoning*\n>\n> hm\n>\n> so\n\nBecause.\n\n"
        "## 3. You (pinned)\n\nAnd?\n\n## 3. tiny\\_2\n\n*(turns 1, 2 were back in context)*\n\n*(no reply)*\n"
    )


def test_hidden_reasoning_is_left_out_and_a_reply_of_reasoning_says_so() -> None:
    hidden = export(a_session(THREE[1], settings={"thinking": "hide"}), "markdown")
    assert "Reasoning" not in hidden
    assert hidden.endswith("\n\nBecause.\n")
    only = export(a_session(a_turn(1, "Why?", "<think>hm</think>")), "markdown")
    assert only.endswith(f"> *Reasoning*\n>\n> hm\n\n*({ONLY_REASONING})*\n")


def test_an_empty_session_has_a_title_only() -> None:
    session = a_session(held=())
    assert export(session, "markdown") == "# The \\*sea\\*\n\ntiny\\_2, day 100 to day 200, 0 turns\n"


def test_json_lines_word_for_word() -> None:
    session = a_session(*THREE, settings={"seed": 3}, parent="s0", parent_turn=2)
    rows = [json.loads(line) for line in export(session, "jsonl").splitlines()]
    assert rows[0] == {
        "streamchat": 1,
        "id": "s1",
        "title": "The *sea*",
        "created": 100.0,
        "model": "/m/tiny",
        "model_name": "tiny_2",
        "settings": {"seed": 3},
        "fork": {"session": "s0", "turn": 2},
    }
    assert rows[1:3] == [
        {"role": "user", "content": "Hello *you*", "turn": 1, "at": 1001.0},
        {"role": "assistant", "content": "Hi.", "turn": 1, "at": 1001.0},
    ]
    assert rows[4] | {"content": ""} == {"role": "assistant", "content": "", "turn": 2, "at": 1002.0, "recalled": [1]}
    about = {"turn": 3, "at": 1003.0, "finish_reason": "cancelled", "recalled": [1, 2]}
    assert rows[6] == {"role": "assistant", "content": "", **about}
    assert "fork" not in json.loads(export(a_session(), "jsonl"))


def test_the_format_of_replay_word_for_word() -> None:
    session = a_session(THREE[0], THREE[2], settings={"system_prompt": "Be kind."}, parent="s0", parent_turn=2)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello *you*"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ]
    text = export(session, "replay")
    assert json.loads(text) == {"id": "s1", "fork": {"session": "s0", "turn": 2}, "messages": messages}
    assert text.endswith("}\n")
    assert json.loads(export(a_session(THREE[0]), "replay")) == {"id": "s1", "messages": messages[1:3]}


def test_the_format_follows_from_the_name() -> None:
    assert FORMATS == {".md": "markdown", ".html": "html", ".jsonl": "jsonl", ".json": "replay"}


@pytest.mark.parametrize(
    ("recalled", "turns", "text"),
    [
        ([], [], ""),
        ([3], [3], "turn 3 was back in context"),
        ((3, 4), [3, 4], "turns 3, 4 were back in context"),
        ([3, True, "4", 5], [3, 5], "turns 3, 5 were back in context"),
        ("34", [], ""),
        (None, [], ""),
    ],
)
def test_recalled_turns_are_named(recalled: Any, turns: list[int], text: str) -> None:
    turn = a_turn(9, stats={"recalled": recalled})
    assert (recalled_turns(turn), recalled_text(turn)) == (turns, text)
    assert recalled_turns(a_turn(9)) == []


def test_a_fork_names_its_parent() -> None:
    assert fork_sentence(a_session(parent="s0", parent_turn=2).info) == "Fork of session s0 at turn 2."
    assert fork_sentence(a_session().info) == ""


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "figures"),
    [
        ({}, ""),
        ({"stats": {"new_tokens": 1}}, "1 token"),
        ({"stats": {"new_tokens": 0}}, ""),
        ({"stats": {"new_tokens": "many", "decode_tps": "fast"}}, ""),
        ({"stats": {"new_tokens": 120, "decode_tps": 31.04}, "finish_reason": "stop"}, "120 tokens · 31.0 tok/s"),
        ({"finish_reason": "cancelled"}, "stopped"),
        ({"finish_reason": "length", "stats": {"new_tokens": 5}}, "stopped at the limit · 5 tokens"),
        ({"finish_reason": "loop"}, "stopped, as it repeated itself"),
        ({"stats": {"recalled": [2]}}, "turn 2 was back in context"),
    ],
)
def test_figures_of_a_turn(changes: dict[str, Any], figures: str) -> None:
    assert _figures(a_turn(1, **changes)) == figures


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        (((10, 11),), "1 token of turn 1 evicted"),
        (((10, 20),), "10 tokens of turn 1 evicted"),
        (((19, 21),), "2 tokens of turns 1 to 2 evicted"),
        (((20, 30),), "10 tokens of turn 2 evicted"),
        (((5, 12), (35, 39)), "11 tokens of turns 1 to 3 evicted"),
        (((12, 13), (14, 15)), "2 tokens of turn 1 evicted"),
        (((0, 4),), "4 tokens evicted"),
        (((60, 64),), "4 tokens evicted"),
    ],
)
def test_an_eviction_names_its_turns(runs: tuple[tuple[int, int], ...], text: str) -> None:
    ends = [turn.start + len(turn.ids) for turn in THREE]
    assert _eviction_text(THREE, ends, StoredEviction(1, 0.0, "prefill", runs, 60, 50)) == text


def test_the_summary_counts_each_kind_of_tokens() -> None:
    session = a_session(*THREE, settings={"num_sink_tokens": 4}, held=((0, 4), (10, 40)), pins=((0, 4), (10, 20)))
    expected = "The model sees 34 of 40 tokens (4 sinks, 10 pinned, 20 recent)"
    assert _summary(session, token_runs(session)) == f"{expected}; 6 were evicted in 3 compressions."
    whole = replace(session, info=replace(session.info, held=((0, 40),)))
    expected = "The model sees 40 of 40 tokens (4 sinks, 10 pinned, 26 recent)"
    assert _summary(whole, token_runs(whole)) == f"{expected}."


def test_settings_of_the_machine_are_not_shown() -> None:
    settings = {"seed": 3, "device": "cpu", "model": "/home/me", "system_prompt": "x", "unknown": 1, "cache_size": 64}
    assert _settings(a_session(settings=settings)) == [("seed", "3"), ("cache_size", "64")]


def test_what_the_page_shows_of_each_turn() -> None:
    eviction = StoredEviction(2, 0.0, "prefill", ((10, 20),), 60, 50)
    settings = {"num_sink_tokens": 4}
    session = a_session(*THREE, settings=settings, pins=((30, 40),))
    one, two, three = _turns(replace(session, evictions=(eviction,)))
    assert (one.number, one.visibility, one.label, one.is_pinned, one.starts_context) == (
        1, "forgotten", "evicted", False, False,
    )  # fmt: skip
    assert (two.visibility, two.label, two.starts_context, two.evictions) == (
        "partly", "partly in context", True, ["10 tokens of turn 1 evicted"],
    )  # fmt: skip
    assert (three.visibility, three.label, three.is_pinned, three.evictions) == ("seen", "", True, [])
    assert (one.sent, one.text, one.thoughts, one.answer) == ("day 1001", "Hello *you*", "", "<p>Hi.</p>\n")
    assert (two.thoughts, two.answer) == ("<p>hm</p>\n<p>so</p>\n", "<p>Because.</p>\n")
    assert (three.answer, three.no_answer, two.no_answer) == ("", "no reply", ONLY_REASONING)
    hidden = a_session(replace(THREE[1], started=0.0), settings={"thinking": "hide"})
    [turn] = _turns(hidden)
    assert (turn.thoughts, turn.answer, turn.sent) == ("", "<p>Because.</p>\n", "")


def test_an_imported_session_has_no_cache() -> None:
    settings = {"num_sink_tokens": 4}
    session = a_session(*THREE, settings=settings, pins=((30, 40),), fingerprint="")
    assert {(turn.visibility, turn.is_pinned, turn.starts_context) for turn in _turns(session)} == {
        ("seen", False, False)
    }
    page = export(session, "html")
    assert "The model sees" not in page
    assert page.endswith("</html>\n")
    assert "The model sees" in export(replace(session, info=replace(session.info, fingerprint="f")), "html")


@pytest.mark.parametrize(
    ("address", "is_safe"),
    [
        ("http://a", True),
        ("HTTPS://a", True),
        ("mailto:a@b", True),
        ("javascript:x", False),
        ("xhttp://a", False),
        ("http", False),
        ("", False),
    ],
)
def test_links_have_few_schemes(address: str, is_safe: bool) -> None:
    assert is_safe_link(address) is is_safe


def test_markdown_becomes_html_with_lower_headings_and_quiet_links() -> None:
    assert markdown_html("# a\n\n#### b") == "<h4>a</h4>\n<h6>b</h6>\n"
    assert markdown_html("[x](http://a/b)") == (
        '<p><a href="http://a/b" title="http://a/b" rel="noopener noreferrer nofollow">x</a></p>\n'
    )
    assert markdown_html("[x]()") == "<p><a>x</a></p>\n"
    assert markdown_html("[x](/y)") == "<p>[x](/y)</p>\n"
    assert markdown_html("~~a~~ ![b](http://a/c.png)").startswith("<p><s>a</s> !<a href=")
    assert "<table>" in markdown_html("| a |\n|---|\n| b |")


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"messages": []}, "conversations"),
        ({"conversations": []}, "conversations"),
        ({"turns": []}, "mt-bench"),
        ({"mapping": {}, "current_node": ""}, "chatgpt"),
        ({"mapping": {}}, None),
        ({"current_node": ""}, None),
        ({"role": "user"}, "messages"),
        ({"from": "human", "value": "x"}, "messages"),
        ({"from": "human"}, None),
        ({"value": "x"}, None),
        ({"streamchat": 1}, "messages"),
        ([], None),
        ("text", None),
    ],
)
def test_records_are_recognized_by_their_keys(record: Any, name: str | None) -> None:
    found = format_of(record)
    assert (None if found is None else found.name) == name


def test_an_unknown_record_is_described_with_what_is_accepted() -> None:
    assert unknown({}) == f"it is JSON, an object with no keys; {ACCEPTED}"
    assert unknown({"a": 1, "b": 2}) == f'it is JSON, an object with "a", "b"; {ACCEPTED}'
    six = ", ".join(f'"{letter}"' for letter in "abcdef")
    assert unknown(dict.fromkeys("abcdef")) == f"it is JSON, an object with {six}; {ACCEPTED}"
    assert unknown(dict.fromkeys("abcdefg")) == f"it is JSON, an object with {six}, ...; {ACCEPTED}"
    assert f"accepted formats: {', '.join(each.record for each in RECORDS)}" == ACCEPTED
    assert [each.is_message for each in RECORDS] == [False, False, False, True]


@pytest.mark.parametrize("turns", ["x", [], [1], ["a", None]])
def test_turns_of_mt_bench_are_texts(turns: Any) -> None:
    found = format_of({"turns": turns})
    assert found is not None
    with pytest.raises(TranscriptError, match='"turns" must be a list of texts'):
        found.read({"turns": turns}, None)
    assert [message.text for message in found.read({"turns": ["a", " ", "b"]}, None).messages] == ["a", "b"]


def test_plain_text_is_one_message_per_line() -> None:
    file = read_transcripts("\n hello \n\nand you?\n", "text")
    [transcript] = file.transcripts
    assert (file.kind, transcript.line) == ("text", 2)
    assert [(message.role, message.text, message.line) for message in transcript.messages] == [
        ("user", "hello", 2),
        ("user", "and you?", 4),
    ]
    assert read_transcripts(" \n", "text").transcripts == []


def test_a_file_of_unknown_records_is_refused_at_its_first_readable_one() -> None:
    with pytest.raises(TranscriptError) as error:
        read_transcripts('{"a": 1}\n{"b": 2}\n')
    assert (str(error.value), error.value.line) == (unknown({"a": 1}), 1)
    with pytest.raises(TranscriptError, match=r"^it is not JSON$"):
        read_transcripts("hello", "messages")
    assert read_transcripts("hello").kind == "text"


def test_records_of_another_kind_are_problems_with_their_line() -> None:
    good = '{"messages": [{"role": "user", "content": "hello"}]}'
    file = read_transcripts(f'{good}\n{{"turns": ["x"]}}\n{{"a": 1}}\n')
    assert file.kind == "conversations"
    assert [transcript.line for transcript in file.transcripts] == [1]
    assert file.problems == [
        (2, "this record has the format mt-bench, but the file has conversations"),
        (3, unknown({"a": 1})),
    ]
    file = read_transcripts(f'[{good}, {{"a": 1}}]')
    assert file.problems == [(1, f"item 2: {unknown({'a': 1})}")]
