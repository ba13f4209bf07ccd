"""Ctrl+Z and SIGTSTP under a shell with job control: the terminal is the shell's meanwhile, and `fg` draws it all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import psutil
import pytest

from tests.support.program import output_of

FACE = Path(__file__).parents[1] / "support" / "scripted_face.py"
ESCAPES = re.compile(r"\x1b\[[0-9;?<>=]*[a-zA-Z]")
SLOW = json.dumps({"replies": [{"text": "one two three four", "hold_after": 2}]})

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


class Shell:
    """bash with job control on a pseudo-terminal, with streamchat as its job."""

    def __init__(self, child: pexpect.spawn[str]) -> None:
        self.child = child

    def job(self) -> psutil.Process:
        jobs = psutil.Process(self.child.pid).children()
        return next(job for job in jobs if str(FACE) in job.cmdline())

    def start(self, scenario: str, *arguments: str) -> None:
        Path("scenario.sh").write_text(f"exec {sys.executable} {FACE} '{scenario}' {' '.join(arguments)}\n")
        self.child.sendline("bash scenario.sh")

    def stopped(self) -> None:
        """The job is stopped, and the terminal is as the shell had it."""
        self.child.expect("Stopped")
        self.child.expect_exact("$ ")
        assert self.job().status() == psutil.STATUS_STOPPED
        self.child.sendline("stty -a")
        self.child.expect_exact("$ ")
        modes = output_of(self.child)
        for mode in ("icanon", "echo", "isig", "icrnl", "ixon"):
            assert re.search(rf"(?<!-)\b{mode}\b", modes), (mode, modes)

    def drawn(self, seconds: float = 1.5) -> str:
        """What comes now, without escapes."""
        text, end = "", time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                text += self.child.read_nonblocking(100_000, timeout=0.1)
            except pexpect.TIMEOUT:
                continue
        return ESCAPES.sub("", text)


@contextmanager
def shell() -> Iterator[Shell]:
    env = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "PS1": "$ "}
    child = pexpect.spawn(
        "bash", ["--norc", "--noprofile", "-i"], timeout=30, dimensions=(24, 80), env=env, encoding="utf-8"
    )
    child.expect_exact("$ ")
    try:
        yield Shell(child)
    finally:
        for job in psutil.Process(child.pid).children():
            job.kill()
        child.close(force=True)


@pytest.mark.slow
def test_the_app_is_drawn_whole_again_after_a_stop() -> None:
    with shell() as sh:
        sh.start(SLOW)
        sh.child.expect("Write a message")
        sh.drawn()
        for _ in range(2):
            sh.drawn()
            os.kill(sh.job().pid, signal.SIGTSTP)
            sh.stopped()
            sh.child.sendline("fg")
            again = sh.drawn(3)
            assert "Write a message" in again
            assert "The cache holds" in again  # not only what changed
            assert "Palette" in again
        sh.child.send("hello\r")
        sh.child.expect("one two")
        os.kill(sh.job().pid, signal.SIGTSTP)  # in a reply
        sh.stopped()
        sh.child.sendline("fg")
        assert "one two" in sh.drawn(3)
        sh.child.send("\x11")
        sh.child.expect_exact("$ ")
        sh.child.sendline("stty -a")
        sh.child.expect(r"(?<!-)\bicanon\b")


@pytest.mark.slow
def test_a_stop_that_cannot_be_noticed_gives_the_terminal_back_too() -> None:
    with shell() as sh:
        sh.start(SLOW)
        sh.child.expect("Write a message")
        sh.drawn()
        os.kill(sh.job().pid, signal.SIGSTOP)
        sh.child.expect("Stopped")
        sh.child.sendline("\nfg")
        assert "The cache holds" in sh.drawn(3)
        sh.child.send("hello\r")
        sh.child.expect("one two")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["the key", "the signal"])
def test_the_prompt_stops_and_goes_on(how: str) -> None:
    with shell() as sh:
        sh.start(SLOW, "--plain")
        sh.child.expect("you> ")
        sh.child.send("half a mess")
        sh.drawn()
        for _ in range(2):
            if how == "the key":
                sh.child.send("\x1a")
            else:
                os.kill(sh.job().pid, signal.SIGTSTP)
            sh.stopped()
            sh.child.sendline("fg")
            assert "half a mess" in sh.drawn()
        sh.child.send("age\r")
        sh.child.expect("one two")
        if how == "the key":
            sh.child.send("\x1a")
        else:
            os.kill(sh.job().pid, signal.SIGTSTP)
        sh.stopped()
        sh.child.sendline("fg")
        sh.drawn()
        sh.child.send("typed in the reply")
        assert "typed" not in sh.drawn()  # not echoed: the modes are those of before
        sh.child.send("\x03")
        sh.child.expect("stopped · ")
        sh.child.expect("typed in the reply")  # and not lost


def test_a_stop_without_a_shell_ends_nothing() -> None:
    """The system ignores SIGTSTP for a process that nobody could continue."""
    env = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(sys.executable, [str(FACE), SLOW, "--plain"], timeout=30, env=env, encoding="utf-8")
    child.expect("you> ")
    assert child.pid is not None
    os.kill(child.pid, signal.SIGTSTP)
    child.send("hello\r")
    child.expect("one two")
    child.close(force=True)
