"""Stop strings on streamed text, whatever its pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.errors import ConfigError
from streamchat.conversation.stops import StopMatcher

TEXT = st.text(alphabet="ab\nU", max_size=30)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    found = [at for at in map(text.find, stops) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


@given(pieces=st.lists(TEXT, max_size=8), stops=st.lists(st.text("ab\nU", min_size=1, max_size=4), max_size=3))
def test_pieces_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        # what was shown is never taken back
        assert "".join(pieces).startswith("".join(shown))
    text, stopped = "", False
    # the first piece that completes a stop string decides; later ones change nothing
    for count in range(1, len(pieces) + 1):
        text, stopped = expected("".join(pieces[:count]), stops)
        if stopped:
            break
    assert matcher.stopped == stopped
    assert "".join(shown) + matcher.flush() == text


def test_only_the_possible_start_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "</s>"])
    assert matcher.push("Hello\nUs") == "Hello"
    assert matcher.push("ed cars") == "\nUsed cars"
    assert matcher.push(" <") == " "
    assert matcher.push("/s> more") == ""
    assert matcher.stopped
    assert matcher.push("again") == ""
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty stop string"):
        StopMatcher(["ok", ""])


def test_the_longest_stop_string_decides_how_much_is_held_back() -> None:
    matcher = StopMatcher(["x", "abcd"])
    assert (matcher.push("ab"), matcher.push("c"), matcher.push("e")) == ("", "", "abce")
    assert matcher.push("zabc") == "z"
    assert (matcher.flush(), matcher.flush()) == ("abc", "")
    assert StopMatcher(["ab"]).push("a") == ""
    assert StopMatcher([]).push("a") == "a"
