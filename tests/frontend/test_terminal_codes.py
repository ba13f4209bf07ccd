"""Control sequences for title, notifications and links: which terminal gets which, and what a text cannot put in."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base import events as ev
from streamchat.base.sanitize import printable
from streamchat.frontend import terminal_codes as codes
from streamchat.frontend.terminal_codes import LinkStream, find_addresses, linked, notifier_of
from streamchat.frontend.window_title import WindowTitle

XTERM = {"TERM": "xterm-256color"}
LINK = re.compile("\x1b]8;;([^\x1b]*)\x1b\\\\(.*?)\x1b]8;;\x1b\\\\", re.DOTALL)


@pytest.mark.parametrize(
    ("environ", "how"),
    [
        ({}, "bell"),
        (XTERM, "bell"),
        (XTERM | {"TERM_PROGRAM": "iTerm.app"}, "osc9"),
        (XTERM | {"TERM_PROGRAM": "WezTerm"}, "osc777"),
        ({"TERM": "xterm-kitty"}, "osc9"),
        ({"TERM": "foot-direct"}, "osc777"),
        ({"TERM": "rxvt-unicode-256color"}, "osc777"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux,1,0"}, "bell"),
        ({"TERM": "screen-256color", "TERM_PROGRAM": "iTerm.app"}, "bell"),
    ],
)
def test_each_terminal_gets_what_it_knows(environ: dict[str, str], how: str) -> None:
    assert notifier_of(environ) == how


def test_the_sequences() -> None:
    assert codes.notification_code("bell", "t", "b") == "\a"
    assert codes.notification_code("osc9", "streamchat", "done") == "\x1b]9;streamchat: done\x1b\\"
    assert codes.notification_code("osc777", "a;b", "c;\x07d\x1b[2Je") == "\x1b]777;notify;a,b;c,de\x1b\\"
    assert codes.title_code("a\x1b[2J\nb" + "x" * 500) == f"\x1b]2;a b{'x' * 117}\x1b\\"


@pytest.mark.parametrize("term", ["", "dumb", "linux", "vt100", "vt220", "unknown", "eterm-color"])
def test_terminals_that_would_show_them_get_none(term: str) -> None:
    assert not codes.supports_osc({"TERM": term})
    assert codes.supports_osc(XTERM)
    title = WindowTitle({"TERM": term}, is_on=True)
    assert (title.begin(), title.after(ev.EngineFailed("t", "m", 1)), title.end()) == ("", "", "")


def test_the_title_follows_the_state() -> None:
    title = WindowTitle(XTERM, is_on=True)
    assert title.begin() == "\x1b[22;2t\x1b]2;streamchat (loading)\x1b\\"
    info = ev.ModelInfo("m\x1b[2J", "", "cpu", "float32", 1, 1, 1, 64, 4, 0, "sdpa", "plain")
    stats = ev.TurnStats(1, 1, 1, 1, 1, 0, 0, None, None, 0, 0, None, "stop")
    steps: list[tuple[ev.Event, str]] = [
        (ev.ModelLoading("x"), ""),
        (ev.ModelReady(info, 1.0), "streamchat: m (ready)"),
        (ev.Notice("x"), ""),
        (ev.TurnStarted(1, "x", 1), "streamchat: m (replying)"),
        (ev.TextDelta(1, "x"), ""),
        (ev.TurnFinished(stats, "stop", "x"), "streamchat: m (ready)"),
        (ev.ModelLoading("x"), "streamchat: m (loading)"),
        (ev.Notice("no such model", "error"), "streamchat: m (ready)"),
        (ev.EngineFailed("t", "m", 1), "streamchat: m (failed)"),
    ]
    for event, text in steps:
        assert title.after(event) == (f"\x1b]2;{text}\x1b\\" if text else "")
    assert title.end() == "\x1b]2;\x1b\\\x1b[23;2t"
    off = WindowTitle(XTERM, is_on=False)
    assert (off.begin(), off.after(ev.ModelReady(info, 1.0)), off.end()) == ("", "", "")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see https://a.example/x?y=(1)) and", ["https://a.example/x?y=(1)"]),
        ("(http://b.c).", ["http://b.c"]),
        ("[text](https://d.e/f)", ["https://d.e/f"]),
        ("**https://d.e**, `https://i.j`", ["https://d.e", "https://i.j"]),
        ("<https://g.h> https://k.l/a_b", ["https://g.h", "https://k.l/a_b"]),
        ("https://[::1]:80/", ["https://[::1]:80/"]),
        ("javascript:alert(1) file:///etc ftp://x.y data:text/html,x mailto:a@b.c", []),
        ("http:// https://. xhttps://no.no", []),
        ("https://日本.jp https://a.b/日本 https://аpple.com", []),  # would not be what they look like
        (f"https://a.b/{'x' * 3000}", []),
    ],
)
def test_only_web_addresses_are_links(text: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in find_addresses(text)] == found
    assert LINK.findall(linked(text)) == [(address, address) for address in found]


PIECES = st.lists(st.text("hHtps:/.ab ()é\n-", max_size=6) | st.sampled_from(["https://", "a.b", "http", "s://x.y "]))


@given(PIECES)
def test_a_stream_loses_nothing_and_each_link_leads_where_it_says(pieces: list[str]) -> None:
    stream = LinkStream()
    text = "".join(map(stream.feed, pieces)) + stream.end()
    assert printable(text) == "".join(pieces)
    assert all(target == shown for target, shown in LINK.findall(text))


def test_an_address_in_pieces_is_one_link() -> None:
    stream = LinkStream()
    assert [stream.feed(piece) for piece in ("see ht", "tps:", "//a.ex", "ample", ". ", "h", "i")] == [
        "see ", "", "", "", linked("https://a.example. "), "", "hi",
    ]  # fmt: skip
    assert stream.feed("https://a.b") == ""
    assert stream.end() == linked("https://a.b") != "https://a.b"
    assert LinkStream().feed("https://" + "x" * 5000) == "https://" + "x" * 5000  # no end in sight


def test_brackets_without_end_take_no_time() -> None:
    start = time.process_time()
    assert list(find_addresses("https://a.b/" + ")" * 200_000)) == [(0, 12)]
    assert time.process_time() - start < 5
