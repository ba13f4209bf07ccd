"""One walk: starts the program, takes the steps, and checks what must hold."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tools.terminal_walk.properties import ScreenProperties
from tools.terminal_walk.steps import RESTORING, FrontEnd, Step
from tools.terminal_walk.terminal import Terminal

BUDGET = 96
READY_S = 90.0
END_S = 60.0
"""Time for an end. A reply of the tiny model takes well under a second."""
PROMPT = "you>"
ESCAPE, INTERRUPT = b"\x1b", b"\x03"


class WalkError(Exception):
    """Something that must hold does not."""


@dataclass
class Findings:
    """What a walk did."""

    taken: Counter[str] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    """Exit code -> times."""
    slowest_s: float = 0.0
    """Longest time from a key to its letter on the screen."""


class Walk:
    """A walk through one front end.

    Args:
        front_end: The app or the prompt.
        model: The folder of the model.
        limit_s: Maximum time until a typed word is on the screen.
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
            WalkError: Something does not hold; the text has the last steps and the screen.
        """
        latest: list[str] = []
        try:
            for number, step in enumerate(steps, 1):
                latest = [*latest[-11:], f"{number}: {step}"]
                self._take(step)
                self.findings.taken[step.kind] += 1
            self._quit()
        except WalkError as error:
            lines = "\n".join(["", *latest, "", *self.terminal.lines()])
            raise WalkError(f"{error}{lines}") from None
        finally:
            self.terminal.kill()

    def _start(self, *arguments: str) -> Terminal:
        terminal = Terminal([*self._command, *arguments], {"PROMPT_TOOLKIT_NO_CPR": "1"})
        if not terminal.wait(lambda: any(self._is_ready(line) for line in terminal.lines()), READY_S):
            raise WalkError(f"the program was not ready within {READY_S:g} s")
        return terminal

    def _is_ready(self, line: str) -> bool:
        return line.startswith(PROMPT) if self._front_end == "prompt" else "Enter sends" in line

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
                self.terminal = self._start("--resume", "last")
            case "terminate":
                os.kill(terminal.process, signal.SIGTERM)
                self._check_end(143)
                self.terminal = self._start("--resume", "last")
        terminal.read(0.01)
        for problem in self._properties.problems(self.terminal.lines()):
            raise WalkError(problem)
        if not self.terminal.is_alive:  # Ctrl+C twice, or Ctrl+D
            self._check_end(0)
            self.terminal = self._start("--resume", "last")

    def _settle(self) -> None:
        """Bring the input back: close what is open, and stop what runs."""
        terminal = self.terminal
        terminal.resize(100, 30)
        if self._front_end == "app":
            for _ in range(3):
                terminal.send(ESCAPE)
                terminal.read(0.2)
        else:
            terminal.wait(lambda: terminal.lines()[terminal.row].startswith(PROMPT), END_S)

    def _probe(self) -> None:
        """Type a word: it must be on the screen in time, also while and after a reply is generated."""
        self._settle()
        if not self.terminal.is_alive:
            return
        self._words += 1
        word, start = f"zq{self._words}w", time.monotonic()
        self.terminal.send(word.encode())
        is_shown = self.terminal.wait(lambda: any(word in line for line in self.terminal.lines()), self._limit_s)
        if not is_shown and self.terminal.is_alive:
            raise WalkError(f"{word!r} was typed and is not on the screen after {self._limit_s:g} s")
        self.findings.slowest_s = max(self.findings.slowest_s, time.monotonic() - start)
        self.terminal.send(b"\x7f" * len(word))

    def _quit(self) -> None:
        self._settle()
        if not self.terminal.is_alive:
            self._check_end(0)
            return
        self.terminal.send(b"x" + INTERRUPT)  # the input has text, which this clears
        self.terminal.read(0.3)
        self.terminal.send(b"\x11" if self._front_end == "app" else b"\x04")
        self._check_end(0)

    def _check_end(self, expected: int) -> None:
        code = self.terminal.exit_code(END_S)
        if code is None:
            raise WalkError(f"the program did not end within {END_S:g} s")
        self.findings.ends[code] += 1
        if code != expected:
            raise WalkError(f"the program ended with exit code {code}, not {expected}")
        if left := self.terminal.unrestored():
            raise WalkError(f"the terminal is not restored: {', '.join(left)}")
