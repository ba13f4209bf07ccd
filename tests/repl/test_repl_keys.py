"""Keys and completion of the prompt, through prompt-toolkit's own input and through a pseudo-terminal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import SlashContext
from streamchat.frontend.status import StatusBoard
from streamchat.repl.keys import interrupt_character, sequences
from streamchat.repl.session import InputLine, MessageCompleter
from tests.support.program import face, sent
from tests.support.scripted_engine import ScriptedEngine

FACE = Path(__file__).parents[1] / "support" / "scripted_face.py"
CTRL_C, CTRL_D, CTRL_G = "\x03", "\x04", "\x07"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    """What is typed; the prompt of the test reads it."""
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        yield typed


def input_line(keys: Mapping[str, str] | None = None) -> InputLine:
    context = SlashContext(ScriptedEngine(), StatusBoard())
    return InputLine(default_registry(), context, InMemoryHistory(), lambda columns: "toolbar", keys)


async def until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        await asyncio.sleep(0.01)


async def asked(line: InputLine, default: str = "") -> str | None:
    return await asyncio.wait_for(line.ask(default), 20)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("one\ntwo\r", "one\ntwo"),  # Ctrl+J is a line feed
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt+Enter
        ("  \r\x15hello\r", "hello"),  # blank is not sent
        ("\x1b[200~first\nsecond\x1b[201~\r", "first\nsecond"),
        ("abc" + CTRL_C + "d\r", "d"),  # clears the line
        ("abc" + CTRL_C + "\x1f" + "d\r", "abcd"),  # Ctrl+_ undoes it
        (CTRL_C + "a\r", "a"),
        (CTRL_C + "a" + CTRL_C + "b\r", "b"),  # not twice in a row
        (CTRL_C + CTRL_C, None),
        (CTRL_D, None),
        ("ab\x1b[H" + CTRL_D + "\r", "b"),  # deletes in a text
    ],
)
async def test_keys(keyboard: PipeInput, typed: str, message: str | None) -> None:
    line = input_line()
    keyboard.send_text(typed)
    assert await asked(line) == message


async def test_the_first_ctrl_c_says_what_the_next_one_does(keyboard: PipeInput) -> None:
    line = input_line()
    keyboard.send_text(CTRL_C)
    waiting = asyncio.ensure_future(line.ask())
    await until(lambda: line.quit_hint in line._toolbar_text(), "the hint")
    assert line.quit_hint == "press Ctrl+C again or Ctrl+D to quit"
    keyboard.send_text("x")
    await until(lambda: line._toolbar_text() == "toolbar", "the figures")
    keyboard.send_text("\r")
    assert await asyncio.wait_for(waiting, 20) == "x"


async def test_what_was_taken_back_is_offered_again(keyboard: PipeInput) -> None:
    keyboard.send_text("!\r")
    assert await asked(input_line(), "again") == "again!"


# --- keys of the user ------------------------------------------------------------------------------------------


async def test_keys_of_the_configuration(keyboard: PipeInput) -> None:
    keys = {"prompt.send": "ctrl+s", "prompt.newline": "f5", "chat.interrupt": "ctrl+x"}
    line = input_line(keys)
    assert line.quit_hint == "press Ctrl+X again or Ctrl+D to quit"
    keyboard.send_text("gone\x18one\rtwo\x1b[15~three\x13")
    assert await asked(line) == "one\ntwo\nthree"


def test_only_what_a_terminal_can_send_is_bound() -> None:
    assert sequences("prompt.newline", {}) == [("c-j",), ("escape", "enter")]
    assert sequences("prompt.edit", {"prompt.edit": "alt+e,ctrl+alt+x,shift+tab"}) == [
        ("escape", "e"),
        ("escape", "c-x"),
        ("s-tab",),
    ]
    assert sequences("prompt.edit", {"prompt.edit": "super+e"}) == []


def test_the_character_that_interrupts() -> None:
    assert interrupt_character({}) is None
    assert interrupt_character({"chat.interrupt": "ctrl+x"}) == 0x18
    assert interrupt_character({"chat.interrupt": "f4,ctrl+c"}) is None


# --- editor ----------------------------------------------------------------------------------------------------


async def test_the_editor_gets_the_draft(keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("edit.py").write_text(
        "import sys\np = sys.argv[1]\nt = open(p).read()\nopen(p, 'w').write(t + ' edited\\n')\n"
    )
    monkeypatch.setenv("VISUAL", f"{sys.executable} {os.getcwd()}/edit.py")
    line = input_line()
    waiting = asyncio.ensure_future(line.ask())
    keyboard.send_text("draft" + CTRL_G)
    await until(lambda: line.session.default_buffer.text == "draft edited", "the edited text")
    keyboard.send_text("\r")
    assert await asyncio.wait_for(waiting, 20) == "draft edited"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "no editor is set"),
        ("false", "exited with code 1; the message is unchanged"),
        ("/no/editor", "could not be started"),
    ],
)
async def test_an_editor_that_fails_is_said(
    keyboard: PipeInput,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("EDITOR", command)
    monkeypatch.delenv("VISUAL", raising=False)
    waiting = asyncio.ensure_future(input_line().ask())
    keyboard.send_text("draft" + CTRL_G)
    said: list[str] = []

    def is_said() -> bool:
        said.append(capsys.readouterr().out)
        return sentence in "".join(said)

    await until(is_said, sentence)
    keyboard.send_text("\r")
    assert await asyncio.wait_for(waiting, 20) == "draft"


# --- completion ------------------------------------------------------------------------------------------------


def offered(text: str) -> list[str]:
    completer = MessageCompleter(default_registry(), SlashContext(ScriptedEngine(), StatusBoard()))
    document = Document(text)
    found = completer.get_completions(document, CompleteEvent())
    return [text[: len(text) + each.start_position] + each.text for each in found]


def test_commands_and_paths_are_offered() -> None:
    Path("notes.txt").write_text("x")
    assert offered("/cl") == ["/clear"]
    assert offered("hello /cl") == []
    assert offered("look at @no") == ["look at @notes.txt"]
    assert offered("first line\nlook at @no") == ["first line\nlook at @notes.txt"]
    assert offered("a@no") == []


async def test_a_dumb_terminal_shows_the_prompt_when_it_reads_keys(
    keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the terminal would echo what is typed, and Enter would insert a new line."""
    monkeypatch.setenv("TERM", "dumb")
    line, modes, written = input_line(), ["cooked"], list[tuple[str, str]]()

    @contextmanager
    def raw_mode() -> Iterator[None]:
        modes.append("raw")
        yield
        modes.pop()

    monkeypatch.setattr(keyboard, "raw_mode", raw_mode)
    monkeypatch.setattr(line.session.output, "write", lambda text: written.append((text, modes[-1])))
    keyboard.send_text("hi\r")
    assert await asked(line) == "hi"
    assert written[:3] == [("you> ", "raw"), ("h", "raw"), ("i", "raw")]
    assert modes == ["cooked"]


# --- the program -----------------------------------------------------------------------------------------------


def test_files_and_another_interrupt_key_on_a_terminal() -> None:
    Path("notes.txt").write_text("from a file")
    Path("keys.toml").write_text('[streamchat]\nconfig_version = 1\n[keys]\nchat.interrupt = "ctrl+x"\n')
    scenario = json.dumps({"replies": [{"text": "one two three", "hold_after": 2}]})
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    command = [str(FACE), scenario, "--plain", "--config", "keys.toml"]
    child = pexpect.spawn(sys.executable, command, timeout=20, dimensions=(24, 80), env=env, encoding="utf-8")
    child.expect("you> ")
    child.send("see @./missing.txt\r")
    child.expect("missing.txt: no such file")
    child.send("\x18")  # it is offered again; clear it
    child.send("/read notes.txt\r")
    child.expect(r"notes\.txt \(1 line, 11 B\) will be attached to your next message")
    child.send("\r")
    child.expect("one two")
    child.send("\x18")
    child.expect("stopped")
    child.expect("you> ")
    child.send("\x18\x18")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_paste_in_a_reply_survives_its_stop() -> None:
    with face("--plain", shows="you> ", replies=[{"text": "one two three", "hold_after": 2}, "ok"]) as child:
        child.send("hello\r")
        child.expect("one two")
        child.send("\x1b[200~    def f():\n        return 1\x1b[201~")
        time.sleep(0.3)
        child.send(CTRL_C)
        child.expect("stopped · ")
        child.expect("return 1")
        child.send("\r")
        assert sent(child, 2)[1] == "    def f():\n        return 1"


def test_a_refused_message_is_offered_as_it_was_typed() -> None:
    Path("notes.txt").write_text("from a file")
    with face("--plain", shows="you> ", replies=[{"error": "no room"}, "ok"]) as child:
        child.send("//help with @notes.txt\r")
        child.expect("no room")
        child.expect("you> ")
        child.expect("//help with @notes.txt")
        child.send("\r")
        assert sent(child, 2) == ["/help with notes.txt:\n```txt\nfrom a file\n```\n"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("moment", ["at the prompt", "in a reply"])
def test_a_signal_ends_the_prompt_in_order(name: str, moment: str) -> None:
    number = getattr(signal, name)
    scenario = json.dumps({"replies": [{"text": "one two three", "hold_after": 2}]})
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    command = [str(FACE), scenario, "--plain"]
    child = pexpect.spawn(sys.executable, command, timeout=20, dimensions=(24, 80), env=env, encoding="utf-8")
    before = termios.tcgetattr(child.child_fd)
    child.expect("you> ")
    if moment == "in a reply":
        child.send("hi\r")
        child.expect("one two")
    changed = termios.tcgetattr(child.child_fd)
    assert changed[3] != before[3]  # no echo, no lines
    child.kill(number)
    child.expect(pexpect.EOF)
    after = termios.tcgetattr(child.child_fd)
    child.close()
    assert after == before
    assert child.exitstatus == 128 + number


def test_a_terminal_that_is_closed_during_a_reply_ends_the_prompt() -> None:
    scenario = json.dumps({"replies": [{"text": "word " * 5_000, "tokens_per_s": 1_000}]})
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    command = [str(FACE), scenario, "--plain"]
    child = pexpect.spawn(sys.executable, command, timeout=20, dimensions=(24, 80), env=env, encoding="utf-8")
    child.expect("you> ")
    child.send("hi\r")
    child.expect("word word")
    assert child.pid
    os.close(child.child_fd)  # `close` of pexpect would send signals
    _pid, status = os.waitpid(child.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
