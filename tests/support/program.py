"""The program in a process of its own, on a scripted engine: through pipes and on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, AnyStr

import pexpect

FACE = Path(__file__).with_name("scripted_face.py")
SUBMITTED = Path("submitted.jsonl")


def run(
    *arguments: str, scenario: dict[str, Any] | None = None, given: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own; with a scenario, on a scripted engine."""
    start = ["-m", "streamchat"] if scenario is None else [str(FACE), json.dumps({"loading": [], **scenario})]
    env = {**os.environ, **environ}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, env=env)


def run_tool(name: str, *arguments: str) -> str:
    """What `python -m tools.NAME` prints; it must succeed."""
    command, root = [sys.executable, "-m", f"tools.{name}", *arguments], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def face(*arguments: str, shows: str, replies: Sequence[object] = ()) -> Iterator[pexpect.spawn[str]]:
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


def sent(child: pexpect.spawn[str], count: int) -> list[str]:
    """The messages so far, when there are `count`."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        lines = SUBMITTED.read_text(encoding="utf-8").splitlines() if SUBMITTED.exists() else []
        if len(lines) >= count:
            return [json.loads(line) for line in lines]
        with contextlib.suppress(pexpect.TIMEOUT):  # or the terminal's buffer is full and the program waits
            child.read_nonblocking(100_000, timeout=0.02)
    raise AssertionError(f"{count} messages did not come")


def output_of(child: pexpect.spawn[AnyStr]) -> AnyStr:
    """What `child` wrote since the last `expect` but one, with the text that the last one found."""
    before, found = child.before, child.after
    assert before is not None
    if found is None or isinstance(found, type):  # the end of the output
        return before
    return before + found
