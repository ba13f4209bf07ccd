"""Takes one walk: starts the program, takes the steps, and checks the properties."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from streamchat.store.store import Store
from streamchat.telemetry.log_file import log_path
from tools.terminal_walk.properties import ScreenProperties
from tools.terminal_walk.steps import RESTORING, FrontEnd, Step
from tools.terminal_walk.terminal import Terminal

BUDGET = 96
HANG_S = 120.0
"""After this time the program hangs, however busy the machine is."""
REPLY_S = 20.0
"""Seconds to wait for a running reply."""
TOOLBAR = re.compile(r"cache [\d,]+/[\d,]+ \[#*\.*\]")
"""The line under the prompt, which is there while the prompt takes input."""
ESCAPE, INTERRUPT, BACKSPACE = b"\x1b", b"\x03", b"\x7f"
CLICK_ON_INPUT = b"\x1b[<0;6;28M\x1b[<0;6;28m"
EARLY = b"early"


class WalkError(Exception):
    """A property does not hold."""


@dataclass
class Findings:
    """The results of a walk."""

    taken: Counter[str] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    """Exit code -> number of ends with it."""
    slowest_s: float = 0.0
    """Longest CPU time of the program from typing a word until it was on the screen."""
    typed_again: int = 0
    """Words that had to be typed twice."""


class Walk:
    """A walk through one front end.

    Args:
        front_end: The app or the prompt.
        model: The folder of the model.
        limit_s: Maximum CPU time of the program until a typed word is on the screen.
    """

    def __init__(self, front_end: FrontEnd, model: Path, limit_s: float) -> None:
        self._front_end, self._limit_s = front_end, limit_s
        options = ("--cache-size", str(BUDGET), "--max-new-tokens", "20", "--kernels", "torch", "--seed", "1")
        self._command = ["-m", "streamchat", "--model", str(model), *options]
        if front_end == "prompt":
            self._command.append("--plain")
        self._properties = ScreenProperties(BUDGET)
        self._words = 0
        self.findings = Findings()
        self.terminal = self._start()

    def take(self, steps: Iterable[Step]) -> None:
        """Take the steps, then quit.

        Raises:
            WalkError: A property does not hold. The message has the last steps and the screen.
        """
        latest: list[str] = []
        try:
            for number, step in enumerate(steps, 1):
                latest = [*latest[-11:], f"{number}: {step}"]
                self._take(step)
                self.findings.taken[step.kind] += 1
            self._quit()
        except WalkError as error:
            lines = "\n".join(["", *latest, "", *self.terminal.lines(), *_log()])
            raise WalkError(f"{error}{lines}") from None
        finally:
            self.terminal.kill()

    def _start(self, *arguments: str) -> Terminal:
        terminal = Terminal([*self._command, *arguments], {})
        terminal.send(EARLY)  # before it has set up anything
        if not terminal.wait(lambda: any(self._is_ready(line) for line in terminal.lines()), HANG_S):
            raise WalkError(f"the program was not ready within {HANG_S:g} s")
        if not terminal.wait(lambda: any(EARLY.decode() in line for line in terminal.lines()), HANG_S):
            raise WalkError("what was typed before the first paint is lost")
        terminal.send(BACKSPACE * len(EARLY))
        return terminal

    def _start_again(self) -> Terminal:
        """Resume the newest session, if there is one."""
        self._properties.restored()  # turns are numbered anew if the session was cleared
        with Store() as store:
            return self._start("--resume", "last") if store.sessions(limit=1) else self._start()

    def _is_ready(self, line: str) -> bool:
        return TOOLBAR.search(line) is not None if self._front_end == "prompt" else "Enter sends" in line

    def _take(self, step: Step) -> None:
        terminal = self.terminal
        match step.kind:
            case "type":
                terminal.send(step.data)
                if step.label.startswith("command"):
                    terminal.read(step.seconds)
                    terminal.send(b"\r")
                if any(command in step.label for command in RESTORING) or "enter" in step.label:
                    self._properties.restored()  # an Enter may choose an entry of a list, such as Undo
            case "resize":
                terminal.resize(*step.size)
            case "pause":
                terminal.read(step.seconds)
            case "probe":
                self._probe()
            case "quit":
                self._quit()
                self.terminal = self._start_again()
            case "terminate":
                os.kill(terminal.process, signal.SIGTERM)
                self._check_end(143)
                self.terminal = self._start_again()
        self.terminal.read(0.01)
        for problem in self._properties.problems(self.terminal.lines()):
            raise WalkError(problem)
        if not self.terminal.is_alive():  # Ctrl+C twice, or Ctrl+D
            self._check_end(0)
            self.terminal = self._start_again()

    def _settle(self) -> None:
        """Return to the input: close dialogs, and stop a running reply. If the app is quitting, wait for its end."""
        terminal = self.terminal
        terminal.resize(100, 30)
        if self._front_end == "app":
            for _ in range(3):
                terminal.send(ESCAPE)
                terminal.read(0.2)
            terminal.send(CLICK_ON_INPUT)  # another widget may have the focus
            terminal.read(0.2)
        else:
            terminal.wait(self._has_toolbar, REPLY_S)  # a size may not be drawn until a key is pressed
        terminal.send(b"x")  # the input has text, so that this clears it and does not quit
        terminal.read(0.1)
        if self._front_end == "app" and terminal.has_signals():  # Ctrl+C would kill it
            terminal.wait(lambda: not terminal.is_alive(), HANG_S)
            return
        if self._front_end == "prompt" and not terminal.wait(self._has_toolbar, HANG_S) and terminal.is_alive():
            raise WalkError(f"the prompt did not come back within {HANG_S:g} s")
        terminal.send(INTERRUPT)
        terminal.read(0.2)

    def _has_toolbar(self) -> bool:
        return any(TOOLBAR.search(line) for line in self.terminal.lines())

    def _probe(self) -> None:
        """Type a word: it must be on the screen in time, whatever happened before.

        A command may open a dialog while the word is typed, so that input and dialog each get a part of it. The walk
        then types it again, as a user would.
        """
        self._settle()
        if not self.terminal.is_alive():  # `_take` checks its exit code
            return
        self._words += 1
        word = f"zq{self._words}w"
        if not self._shows(word, self._limit_s):
            self.findings.typed_again += 1
            if not self._shows(word, HANG_S):
                raise WalkError(f"{word!r} was typed twice and is not on the screen")
        self.terminal.send(BACKSPACE * len(word))

    def _shows(self, word: str, cpu_s: float) -> bool:
        """Type a word; return whether it is on the screen within this CPU time, or the program has ended."""
        terminal = self.terminal
        start = terminal.cpu_s()
        terminal.send(word.encode())
        terminal.wait(
            lambda: any(word in line for line in terminal.lines()) or terminal.cpu_s() - start > cpu_s, HANG_S
        )
        seconds = terminal.cpu_s() - start
        is_shown = any(word in line for line in terminal.lines())
        if is_shown:
            self.findings.slowest_s = max(self.findings.slowest_s, seconds)
            if seconds > self._limit_s:
                raise WalkError(f"{word!r} came to the screen after {seconds:.1f} s of CPU time")
        return is_shown or not terminal.is_alive()

    def _quit(self) -> None:
        self._settle()
        if not self.terminal.is_alive():
            self._check_end(0)
            return
        # Ctrl+D ends the prompt only if nothing was typed while a reply was stopped. Ctrl+Q ends the app, which may
        # take long while a model is loaded; a Ctrl+C that comes after the terminal was restored would kill it
        key, seconds = (b"\x11", HANG_S) if self._front_end == "app" else (b"\x04", 3)
        for _ in range(10):
            self.terminal.send(key)
            if self.terminal.wait(lambda: not self.terminal.is_alive(), seconds):
                break
            self._settle()
        self._check_end(0)

    def _check_end(self, expected: int) -> None:
        code = self.terminal.exit_code(HANG_S)
        if code is None:
            raise WalkError(f"the program did not end within {HANG_S:g} s")
        self.findings.ends[code] += 1
        if code != expected:
            raise WalkError(f"the program ended with exit code {code}, not {expected}")
        if left := self.terminal.unrestored():
            raise WalkError(f"the terminal is not restored: {', '.join(left)}")


def _log() -> list[str]:
    """Return the last lines of the program's log."""
    path = log_path()
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-40:] if path.exists() else []
