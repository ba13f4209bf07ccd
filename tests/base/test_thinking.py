"""Reasoning told apart from the answer, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.thinking import ThinkingStream, split

WHOLE = [
    ("Hello.", ("", "Hello.")),
    ("<think>\nwell\n</think>\n\nHello.", ("well", "Hello.")),
    ("<think></think>Hello.", ("", "Hello.")),
    ("\n <think>a\n\nb</think>c", ("a\n\nb", "c")),
    ("<think>a</think><think>b</think>c", ("ab", "c")),
    ("<think>never closed", ("never closed", "")),
    ("Say <think>x</think> loud", ("", "Say <think>x</think> loud")),
    ("<think>a < b </thin k> c</think>d", ("a < b </thin k> c", "d")),
    ("<thin", ("", "<thin")),
    ("<thinking>x", ("", "<thinking>x")),
    ("", ("", "")),
    ("  x", ("", "  x")),
    ("<think>a</think>\n\n  indented", ("a", "indented")),
]


@pytest.mark.parametrize(("reply", "parts"), WHOLE)
def test_whole_replies(reply: str, parts: tuple[str, str]) -> None:
    assert split(reply) == parts


def streamed(pieces: list[str]) -> tuple[str, str]:
    stream = ThinkingStream()
    parts = [part for piece in pieces for part in stream.feed(piece)] + stream.end()
    assert all(part.text for part in parts)
    thoughts = "".join(part.text for part in parts if part.kind == "thought")
    return thoughts, "".join(part.text for part in parts if part.kind == "answer")


@pytest.mark.parametrize("reply", [reply for reply, _ in WHOLE])
def test_letter_by_letter_is_the_same(reply: str) -> None:
    assert streamed(list(reply)) == split(reply)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", "\n", " ", "word", "é"]), max_size=25),
    st.data(),
)
def test_any_cut_is_the_same(tokens: list[str], data: st.DataObject) -> None:
    reply = "".join(tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=8)))
    pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    assert streamed(pieces) == split(reply)


def test_an_answer_is_never_held_back() -> None:
    stream = ThinkingStream()
    assert [part.text for part in stream.feed("Hel")] == ["Hel"]
    assert [part.text for part in stream.feed("lo <thi")] == ["lo <thi"]


def test_thoughts_come_at_once() -> None:
    stream = ThinkingStream()
    assert stream.feed("<thi") == []
    assert [part.text for part in stream.feed("nk>I wonder")] == ["I wonder"]
