"""Pastes through a pseudo-terminal: whatever is in one, it is one message, sent by Enter and not before."""

from __future__ import annotations

import pexpect
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamchat.base.sanitize import printable
from tests.support.program import SUBMITTED, face, sent

pytestmark = pytest.mark.fuzz

# a terminal takes the end mark out of what is pasted; / and @ would be a command and a file
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="/@\x1b")
SEQUENCES = st.sampled_from(["\x1b[31m", "\x1b]0;title\x07", "\x1b[2J", "\x9b1m", "\x03", "\x04", "\x11", "\x1a", "\0"])
PASTES = st.lists(
    st.text(LETTERS, max_size=20) | SEQUENCES | st.sampled_from(["\n", "\r\n", "\r", "\t", "    x"]), max_size=8
)


SHOWN = {("--plain",): "you> ", (): "Write a message"}


def messages_of(paste: str) -> tuple[str, str]:
    """What the prompt sends and what the app sends: line ends as they are inside, no control characters.

    The prompt takes whole escape sequences out, the app the escape only; its tabs are spaces, and what Unicode calls
    the end of a line is one.
    """
    text = paste.replace("\r\n", "\n").replace("\r", "\n")
    in_app = printable(text.replace("\x1b", "")).expandtabs(4)
    return printable(text), "\n".join(in_app.splitlines())


def pasted(child: pexpect.spawn[str], text: str, count: int) -> list[str]:
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
