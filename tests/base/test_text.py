"""Text that is safe on a terminal."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.sanitize import PrintableStream, one_line, printable

CASES = [
    ("plain\n\ttext", "plain\n\ttext"),
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b[2J\x1b[H", ""),
    ("\x1b]0;title\x07after", "after"),
    ("\x1b]52;c;cGFzdGU=\x1b\\after", "after"),  # the clipboard
    ("\x1bPq#0\x1b\\after", "after"),
    ("\x9b31mred", "red"),
    ("\x1bcreset", "reset"),
    ("\x1b(Bcharset", "charset"),
    ("bell\x07 null\x00 del\x7f cr\r", "bell null del cr"),
    ("lone \ud83d surrogate", "lone � surrogate"),
    ("über 日本語 🙂", "über 日本語 🙂"),
    ("\x1b", ""),
    ("a [31m b", "a [31m b"),
    ("ab\u202edc\u202c", "abdc"),  # shown as abcd otherwise
    ("\u2066x\u2069 \u202ay\u202b\u202d \u206az\ufff9", "x y z"),
    (
        "קובץ\u200f! می\u200cخواهم क्\u200dष 👩\u200d👩\u200d👧 ❤\ufe0f",
        "קובץ\u200f! می\u200cخواهم क्\u200dष 👩\u200d👩\u200d👧 ❤\ufe0f",
    ),
]


@pytest.mark.parametrize(("text", "shown"), CASES)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("  two\n\tlines \x1b[1mbold ", "two lines bold"),
        ("pass\u200bword\u200e\u200f\u061c\u2060\ufeff\u00ad", "password"),
        ("ad\u200dmin\u200c", "admin"),
        ("evil\u202etxt.exe", "eviltxt.exe"),
        ("tag\U000e0041\U000e007f", "tag"),
        ("می\u200cخواهم क्\u200dष 👩\u200d👧 ❤\ufe0f", "می\u200cخواهم क्\u200dष 👩\u200d👧 ❤\ufe0f"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", None),  # a flag
    ],
)
def test_names_have_nothing_that_cannot_be_seen(text: str, shown: str | None) -> None:
    assert one_line(text) == (text if shown is None else shown)


def streamed(pieces: list[str]) -> str:
    stream = PrintableStream()
    return "".join(map(stream.feed, pieces)) + stream.end()


@pytest.mark.parametrize(("text", "shown"), CASES)
def test_letter_by_letter_is_the_same(text: str, shown: str) -> None:
    assert streamed(list(text)) == shown


def test_text_is_not_held_back() -> None:
    stream = PrintableStream()
    assert stream.feed("Hello") == "Hello"
    assert stream.feed(" there\x1b[3") == " there"
    assert stream.feed("1m!") == "!"


def test_a_sequence_without_an_end_cannot_swallow_the_reply() -> None:
    text = "\x1b]0;" + "x" * 1_000 + " the answer\x07"
    assert streamed([text[i : i + 7] for i in range(0, len(text), 7)]).endswith(" the answer")
    assert printable(text).endswith(" the answer")


PIECES = [
    "\u202e",
    "\u2067",
    "\x1b",
    "[",
    "]",
    "0;",
    "31",
    "m",
    "\x07",
    "\x1b\\",
    "\x9b",
    "P",
    "text",
    "\n",
    "é",
    "\x00",
    "\ud800",
]


@given(st.lists(st.sampled_from(PIECES), max_size=30))
def test_nothing_that_comes_out_controls_a_terminal(pieces: list[str]) -> None:
    for shown in (printable("".join(pieces)), streamed(pieces)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u206f]", shown)
        shown.encode()


REORDERING = "".join(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x2070), *range(0xFFF9, 0xFFFC)]))


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=REORDERING)))
def test_other_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text
    assert streamed(list(text)) == text
