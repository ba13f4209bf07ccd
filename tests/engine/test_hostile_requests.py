"""Requests that no front end of ours sends, but a program on a socket may: a sentence each, and the chat goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from streamchat.base import events as ev
from streamchat.base import requests as rq
from tests.support.real_engine import running

BIG = 2**63 - 1
HOSTILE: list[tuple[rq.Request, str]] = [
    (rq.SetOption("nonsense", 1), "/set lists the settings"),
    (rq.SetOption("x" * 10_000, 1), "xxx is not "),
    (rq.SetOption("cache_size", 64), "cache_size cannot change during a chat"),
    (rq.SetOption("temperature", "hot"), "temperature must be a number"),
    (rq.SetOption("temperature", math.nan), "temperature = nan is not valid"),
    (rq.SetOption("temperature", math.inf), "temperature = inf is not valid"),
    (rq.SetOption("seed", True), "seed must be a whole number"),
    (rq.SetOption("max_new_tokens", 0), "max_new_tokens = 0 is not valid"),
    (rq.SetOption("thinking", "loud"), "thinking = 'loud' is not valid"),
    (rq.Pin(0), "turn 0 does not exist"),
    (rq.Pin(-1), "turn -1 does not exist"),
    (rq.Pin(BIG), f"turn {BIG} does not exist"),
    (rq.Unpin(-1), "turn -1 does not exist"),
    (rq.OpenSession(""), "the current conversation continues"),
    (rq.OpenSession("../../etc/passwd"), "no saved session has the id '../../etc/passwd'"),
    (rq.OpenSession("\udc80%_"), "no saved session has the id '?%_'"),
    (rq.SetTitle("\x1b]0;title\x07"), "a title needs at least one visible character"),
    (rq.SetSystemPrompt("long " * 1000), "Nothing has changed: the system prompt"),
]


@pytest.mark.parametrize(("request_", "sentence"), HOSTILE, ids=lambda value: str(value)[:40])
def test_each_is_one_notice_and_the_chat_goes_on(request_: rq.Request, sentence: str, tmp_path: Path) -> None:
    with running(store=tmp_path / "chats.db", max_new_tokens=2) as chat:
        chat.turn("hello")
        settings = chat.engine.settings
        chat.engine.send(request_)
        assert chat.turn("go on").stats.turn == 2
        assert [notice.text for notice in chat.of(ev.Notice) if sentence in notice.text], chat.of(ev.Notice)
        assert chat.engine.settings == settings


@pytest.mark.parametrize(
    "request_",
    [
        rq.Submit(""),
        rq.Submit("\x00\udc80\U0010ffff"),
        rq.Submit("word " * 500),
        rq.Edit(""),
        rq.Quote("", "", pin=True),
        rq.Quote("a", "b" * 2_000, pin=True),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_is_a_turn_or_rolled_back(request_: rq.Request) -> None:
    with running(max_new_tokens=2) as chat:
        chat.turn("hello")
        chat.turn("", lambda _: chat.engine.send(request_))
        assert chat.turn("go on").finish_reason in ("stop", "length")
        assert not chat.engine.busy
