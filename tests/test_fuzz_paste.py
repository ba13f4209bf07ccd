"""Pastes through a pseudo-terminal: whatever is in one, it is one message, sent by Enter and not before."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamchat.base.sanitize import printable

pytestmark = pytest.mark.fuzz

FACE = Path(__file__).with_name("scripted_face.py")
SUBMITTED = Path("submitted.jsonl")
# a terminal takes the end mark out of what is pasted; / and @ would be a command and a file
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="/@\x1b")
SEQUENCES = st.sampled_from(["\x1b[31m", "\x1b]0;title\x07", "\x1b[2J", "\x9b1m", "\x03", "\x04", "\x11", "\x1a", "\0"])
PASTES = st.lists(
    st.text(LETTERS, max_size=20) | SEQUENCES | st.sampled_from(["\n", "\r\n", "\r", "\t", "    x"]), max_size=8
)


SHOWN = {("--plain",): "you> ", (): "Write a message"}


@contextmanager
def face(*arguments: str, shows: str, replies: Sequence[object] = ()) -> Iterator[pexpect.spawn]:
    """The program on a terminal of 80 x 24."""
    env = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "SUBMITTED": str(SUBMITTED)}
    env["PYTHONUTF8"] = "1"
    command = [str(FACE), json.dumps({"loading": [], "replies": list(replies)}), *arguments]
    child = pexpect.spawn(sys.executable, command, timeout=30, dimensions=(24, 80), env=env, encoding="utf-8")
    child.delaybeforesend = None
    child.expect(shows)
    try:
        yield child
    finally:
        child.close(force=True)


def sent(child: pexpect.spawn, count: int) -> list[str]:
    """The messages so far, when there are `count`."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        lines = SUBMITTED.read_text(encoding="utf-8").splitlines() if SUBMITTED.exists() else []
        if len(lines) >= count:
            return [json.loads(line) for line in lines]
        with contextlib.suppress(pexpect.TIMEOUT):  # or the terminal's buffer is full and the program waits
            child.read_nonblocking(100_000, timeout=0.02)
    raise AssertionError(f"{count} messages did not come")


def messages_of(paste: str) -> tuple[str, str]:
    """What the prompt sends and what the app sends: line ends as they are inside, no control characters.

    The prompt takes whole escape sequences out, the app the escape only; its tabs are spaces, and what Unicode calls
    the end of a line is one.
    """
    text = paste.replace("\r\n", "\n").replace("\r", "\n")
    in_app = printable(text.replace("\x1b", "")).expandtabs(4)
    return printable(text), "\n".join(in_app.splitlines())


def pasted(child: pexpect.spawn, text: str, count: int) -> list[str]:
    """Paste and press Enter; returns all messages so far."""
    child.send(f"\x1b[200~{text}\x1b[201~")
    child.send("\r")
    return sent(child, count)


@pytest.mark.parametrize("arguments", [("--plain",), ()], ids=["prompt", "app"])
def test_any_paste_is_one_message(arguments: tuple[str, ...]) -> None:
    @settings(max_examples=settings().max_examples // 10)  # a process each
    @given(PASTES)
    @example(["first line\n", "second line\n", "\tthird ", "\x1b[31m", "\r\n", "last"])
    def paste(parts: list[str]) -> None:
        text = "a" + "".join(parts) + "z"
        prompt, app = messages_of(text)
        SUBMITTED.unlink(missing_ok=True)
        with face(*arguments, shows=SHOWN[arguments]) as child:
            assert pasted(child, text, 1) == [prompt if arguments else app]

    paste()


@pytest.mark.parametrize("arguments", [("--plain",), ()], ids=["prompt", "app"])
def test_thousands_of_lines_are_one_message(arguments: tuple[str, ...]) -> None:
    text = "\n".join(f"line {number} of a long file = [{number}]" for number in range(3000))
    with face(*arguments, shows=SHOWN[arguments]) as child:
        assert pasted(child, text, 1) == [text]
