"""The size of a message before it is sent."""

from __future__ import annotations

from pathlib import Path

from streamchat.base.events import CacheState
from streamchat.tui.measure import MessageSize

CACHE = CacheState(cache_size=100, sinks=4, pinned=6)
LONG = "word " * 200


def test_short_texts_are_not_measured() -> None:
    asked: list[str] = []
    size = MessageSize(asked.append)
    size.measure("hello")
    assert asked == []
    assert size.summary("hello", CACHE) == ""


def test_an_estimate_until_the_tokens_are_counted() -> None:
    asked: list[str] = []
    size = MessageSize(asked.append)
    assert size.summary(LONG, CACHE) == "about 250 tokens in 1 line, 90 fit: its beginning will be evicted"
    assert size.summary(LONG, CacheState()) == "about 250 tokens in 1 line"  # the model is being loaded
    size.measure(LONG)
    size.measure(LONG)
    assert asked == [LONG]
    size.counted(LONG, 80)
    assert size.summary(LONG, CACHE) == "80 tokens in 1 line, 90 fit"
    assert size.summary(f"{LONG}more", CACHE).startswith("about 251 tokens")


def test_one_question_at_a_time_and_the_last_text_counts() -> None:
    asked: list[str] = []
    size = MessageSize(asked.append)
    for text in (LONG, LONG * 2, LONG * 3):
        size.measure(text)
    assert asked == [LONG]
    size.counted(LONG, 80)
    assert asked == [LONG, LONG * 3]
    size.counted(LONG * 3, 240)
    assert size.summary(LONG * 3, CACHE).startswith("240 tokens")
    assert asked == [LONG, LONG * 3]


def test_files_count_as_what_they_hold() -> None:
    Path("short.txt").write_text("a\nb\n")
    asked: list[str] = []
    size = MessageSize(asked.append)
    size.measure("see @short.txt")
    assert asked == ["see short.txt:\n```txt\na\nb\n```\n"]
    size.counted(asked[0], 12)
    assert size.summary("see @short.txt", CACHE) == "12 tokens in 6 lines, 90 fit"
    size.measure("see @missing.txt")  # told when it is sent
    assert len(asked) == 1


def test_answers_for_other_front_ends_are_not_its_own() -> None:
    asked: list[str] = []
    size = MessageSize(asked.append)
    size.measure(LONG)
    size.counted("the draft of another front end", 5)
    assert asked == [LONG]
    size.counted(LONG, 0)  # the server could not count them
    assert asked == [LONG]
    assert size.summary(LONG, CACHE).startswith("about 250 tokens")
