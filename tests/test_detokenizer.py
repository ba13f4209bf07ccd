"""Text streamed id by id: whole characters, at once, equal to decoding everything together."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamchat.chat.detokenizer import REPLACEMENT, Detokenizer
from streamchat.chat.stops import StopMatcher
from streamchat.errors import ConfigError
from tests.toy_tokenizer import VOCABULARY, toy_tokenizer

TEXTS = [
    "plain words, and more words",
    "family 👨‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽",
    "Привет, мир",
    "안녕하세요 세계",
    "  leading and   inner spaces\n\n\ttabs",
    "a real \N{REPLACEMENT CHARACTER} inside, and at the end \N{REPLACEMENT CHARACTER}",
    "x" * 400,
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    tokenizer = toy_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    tail = detokenizer.flush()
    assert "".join(pieces) + tail == text
    assert "".join(pieces).count(REPLACEMENT) <= text.count(REPLACEMENT)


def test_text_without_spaces_is_not_held_back() -> None:
    tokenizer = toy_tokenizer()
    ids = tokenizer("q" * 200, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert all(detokenizer.push(token) for token in ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=60))
def test_any_ids_join_to_the_one_shot_decoding(ids: list[int]) -> None:
    tokenizer = _SHARED
    ids = [token for token in ids if token < len(tokenizer)]
    detokenizer = Detokenizer(tokenizer)
    streamed = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert streamed == tokenizer.decode(ids, skip_special_tokens=True)


_SHARED = toy_tokenizer()


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_stop_string_is_found_across_pieces_and_never_shown(cut: int) -> None:
    text = "Hello Use\nUsual\nUser: hi"
    matcher = StopMatcher(["\nUser:", "\nAssistant:"])
    shown = "".join(matcher.push(text[at : at + cut]) for at in range(0, len(text), cut))
    assert shown == "Hello Use\nUsual"
    assert matcher.stopped


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "#"])
    assert matcher.push("one\nUs") == "one"
    assert matcher.push("ual ") == "\nUsual "
    assert matcher.push("x\nUse") == "x"
    assert matcher.flush() == "\nUse"
    assert matcher.push("a#b") == "a"
    assert matcher.stopped
    assert matcher.push("more") == ""


def test_the_earliest_of_several_stop_strings_wins() -> None:
    matcher = StopMatcher(["Paris", "Pari", "is"])
    assert matcher.push("The city of Paris") == "The city of "


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty stop string"):
        StopMatcher(["ok", ""])
