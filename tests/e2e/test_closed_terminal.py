"""A terminal that is closed ends the program with exit code 129, also where the kernel sends no SIGHUP."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import selectors
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamchat.cli.stdout import Output, is_hung_up
from streamchat.repl.terminal import terminal_modes
from streamchat.tui.terminal import TerminalFile
from tests.support.app_driver import driving
from tests.support.program import FACE
from tests.support.scripted_engine import Reply, ScriptedEngine

REPLY = {"text": "word " * 5_000, "tokens_per_s": 1_000}


def read_until(terminal: int, pattern: bytes) -> None:
    """Read what the program draws until `pattern` is in it."""
    seen, end = b"", time.monotonic() + 30
    with selectors.DefaultSelector() as selector:
        selector.register(terminal, selectors.EVENT_READ)
        while re.search(pattern, seen) is None:
            assert time.monotonic() < end, seen[-2000:]
            if selector.select(0.1):
                seen += os.read(terminal, 100_000)


@pytest.mark.parametrize(("arguments", "moment"), [(["--plain"], "idle"), (["--plain"], "reply"), ([], "reply")])
def test_a_closed_terminal_that_sends_no_signal(arguments: list[str], moment: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, str(FACE), json.dumps({"replies": [REPLY]}), *arguments]
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=stderr, start_new_session=True, env=env)
    os.close(theirs)
    try:
        read_until(ours, rb"you> " if arguments else rb"Enter")
        if moment == "reply":
            os.write(ours, b"hi\r")
            read_until(ours, rb"word")
        os.close(ours)
        assert child.wait(timeout=20) == 129
    finally:
        child.kill()
        child.wait()
    assert "unexpected" not in errors.read_text()
    assert "Traceback" not in errors.read_text()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Our end and the program's end of a terminal."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(theirs)


def test_what_is_drawn_on_a_closed_terminal_is_dropped(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    with TerminalFile(os.dup(theirs), "w") as screen:
        assert screen.write(b"seen") == 4
        assert os.read(ours, 10) == b"seen"
        os.close(ours)
        assert screen.write(memoryview(b"dropped")) == 7


def test_a_closed_terminal_is_told_from_other_errors(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = terminal
    with open(os.dup(theirs), encoding="utf-8") as stdin, open(os.dup(theirs), "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", Output(stdout))
        assert terminal_modes() is not None
        assert not is_hung_up(OSError(5, "another file"))
        os.close(ours)
        assert terminal_modes() is None
        assert is_hung_up(termios.error(5, "Input/output error"))
        assert not is_hung_up(OSError(2, "No such file or directory"))


@pytest.mark.slow
async def test_a_closed_terminal_may_be_reported_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system and by the keyboard; a second Ctrl+Q exits immediately, this does not."""
    monkeypatch.setattr("streamchat.tui.leaving.CLOSE_S", 1.0)
    engine = ScriptedEngine([Reply("one two", hold_after=1)], stuck=True)
    async with driving(engine) as driver:
        await driver.begin("go")
        driver.app._leaving.watch_signals()  # tests run without a terminal, so the app does not
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.2)
        assert driver.app.is_running
        await driver.until(lambda: not driver.app.is_running)
        engine.release()
    assert driver.app.return_code == 129
