"""What the app takes from the keyboard: a paste is one paste whatever is in it."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.drivers.linux_driver import LinuxDriver
from textual.events import Key, Resize

from streamchat.tui.key_parser import KeyParser
from streamchat.tui.keyboard import BEGIN, END, KeyboardDriver, PasteGuard
from tests.support.program import face, sent

KEYS = st.lists(st.sampled_from(["a", "\r", "\x1b", "\x1b[A", "\x1b[200", "\x1b[<0;1;1M", END]), max_size=6)
INSIDE = st.lists(st.sampled_from(["a", "\r", "\x1b", "\x1b[201", "\x1b[31m", BEGIN]), max_size=6)


@pytest.mark.fuzz
@given(KEYS.map("".join), INSIDE.map("".join), KEYS.map("".join), st.integers(1, 7))
def test_escapes_leave_pastes_and_stay_in_keys(before: str, inside: str, after: str, step: int) -> None:
    before += "x"  # no beginning of a mark at the seams
    typed = before + BEGIN + inside + "x" + END + "x" + after
    guard = PasteGuard()
    out = "".join(guard.feed(typed[at : at + step]) for at in range(0, len(typed), step))
    assert out == before + BEGIN + inside.replace("\x1b", "") + "x" + END + "x" + after


def test_an_enter_behind_an_escape_in_a_paste_sends_nothing() -> None:
    with face(shows="Write a message") as child:
        child.send("\x1b[200~one \x1b[\rtwo\x1b[201~")
        child.send(" three\r")
        assert sent(child, 1) == ["one [\ntwo three"]


def test_bytes_that_are_no_utf8_end_nothing() -> None:
    with face(shows="Write a message") as child:
        os.write(child.child_fd, b"caf\xe9 \xff")  # as a Latin-1 terminal sends them
        child.send("ok\r")
        assert sent(child, 1) == ["caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}ok"]


ODD_SEQUENCES = (
    "\x1b[57441;2:3u",  # kitty's report of a released key, if another program has left that mode on
    "\x1b[97;1:3u",
    "\x1b[4294967296u",  # not a character
    "\x1b[9999999999999999999999;5u",
    "\x1b[48;0;0;0;0t",  # a terminal without a size
    "\x1b[48;999999;999999;1;1t",
    "\x1b[<0;1;1M",
)


def test_a_sequence_that_cannot_be_read_is_dropped_and_input_goes_on() -> None:
    parser = KeyParser()
    for sequence in ODD_SEQUENCES:
        events = [*parser.feed(f"{sequence}x")]
        assert not [event for event in events if isinstance(event, Resize)]
        assert [event.key for event in events if isinstance(event, Key)] == ["x"], sequence
    assert [*parser.end()] == []


def test_such_sequences_do_not_end_the_app() -> None:
    with face(shows="Write a message") as child:
        child.send(f"a{''.join(ODD_SEQUENCES)}b\r")
        assert sent(child, 1) == ["ab"]


def test_what_is_typed_while_the_app_starts_is_kept() -> None:
    with face(shows="") as child:  # at once, before Python has read a line
        child.send("early")
        child.expect("Enter sends")
        child.send(" text\r")
        assert sent(child, 1) == ["early text"]


def test_keys_wait_in_order_until_the_app_can_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    monkeypatch.setattr(LinuxDriver, "process_message", lambda driver, message: passed.append(message.key))
    driver: Any = KeyboardDriver.__new__(KeyboardDriver)
    driver._app = SimpleNamespace(takes_input=threading.Event())
    driver.process_message(Key("a", "a"))
    driver._pass_early()
    driver.process_message(Key("b", "b"))
    assert passed == []
    driver._app.takes_input.set()
    driver._pass_early()
    driver.process_message(Key("c", "c"))
    assert passed == ["a", "b", "c"]
