"""Runs the program on a pseudo-terminal, and reads the screen that a user would see."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import termios
import time
from collections.abc import Callable, Sequence
from typing import Any

import pexpect
import psutil
import pyte
from wcwidth import wcwidth

_MODE = re.compile(rb"\x1b\[\?([\d;]+)([hl])")
_KITTY = re.compile(rb"\x1b\[([<>])\d*u")
_DEFAULT_ON = {7, 25}
"""Private modes that a terminal has on: line wrap, and the cursor."""


class _Screen(pyte.Screen):
    """A screen that sends answers, such as the position of the cursor, to the program."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, rows)
        self._send = answer

    def write_process_input(self, data: str) -> None:
        """Send an answer."""
        self._send(data)

    @property
    def display(self) -> list[str]:
        """The lines as text. pyte's own property fails if the first half of a wide character was overwritten."""
        return [_text([self.buffer[row][column].data for column in range(self.columns)]) for row in range(self.lines)]


def _text(cells: list[str]) -> str:
    """Return the text of a line; the cell after a wide character is empty, and blank without that character."""
    before = ["", *cells]
    return "".join(cell or ("" if wcwidth(left[:1]) == 2 else " ") for left, cell in zip(before, cells, strict=False))


class Terminal:
    """A child process on a pseudo-terminal.

    Args:
        command: The arguments of Python.
        environ: Additional variables.
    """

    def __init__(self, command: Sequence[str], environ: dict[str, str]) -> None:
        env = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **environ}
        self.columns, self.rows = 100, 30
        self._modes: dict[int, bool] = {}
        self._kitty = 0
        self._cpu_s = 0.0
        self._tail = b""
        self._screen = _Screen(self.columns, self.rows, self._answer)
        self._stream: Any = pyte.ByteStream(self._screen)
        self._child: pexpect.spawn[bytes] = pexpect.spawn(
            sys.executable, list(command), env=env, dimensions=(self.rows, self.columns), timeout=60
        )
        self._child.delaybeforesend = None
        self._before = self._settings = termios.tcgetattr(self._child.child_fd)

    def is_alive(self) -> bool:
        """Whether the program runs."""
        return bool(self._child.isalive())

    @property
    def process(self) -> int:
        """The id of the process."""
        assert self._child.pid is not None
        return self._child.pid

    def cpu_s(self) -> float:
        """Return the CPU time of the program's first thread, which draws; after its end, the last known value."""
        with contextlib.suppress(psutil.Error):
            for thread in psutil.Process(self.process).threads():
                if thread.id == self.process:
                    self._cpu_s = thread.user_time + thread.system_time
        return self._cpu_s

    def has_signals(self) -> bool:
        """Whether Ctrl+C sends SIGINT, as it does before the app has started and after it has restored the terminal."""
        with contextlib.suppress(OSError, termios.error):
            return bool(termios.tcgetattr(self._child.child_fd)[3] & termios.ISIG)
        return True

    @property
    def row(self) -> int:
        """The row of the cursor, from 0."""
        return min(int(self._screen.cursor.y), self.rows - 1)

    def lines(self) -> list[str]:
        """Return the lines of the screen."""
        return [line.rstrip() for line in self._screen.display]

    def send(self, data: bytes) -> None:
        """Type bytes. Meanwhile, read what the program writes, because it may wait for that."""
        for at in range(0, len(data), 512):
            with contextlib.suppress(OSError):  # it has ended
                self._child.send(data[at : at + 512])
            self.read(0)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the terminal."""
        self.columns, self.rows = columns, rows
        with contextlib.suppress(OSError):
            self._child.setwinsize(rows, columns)
        self._screen.resize(rows, columns)

    def read(self, seconds: float) -> None:
        """Read what the program has written, and what it writes within this time."""
        end = time.monotonic() + seconds
        while True:
            try:
                data = self._child.read_nonblocking(65_536, max(0.0, min(0.05, end - time.monotonic())))
            except pexpect.TIMEOUT:
                if time.monotonic() >= end:
                    return
            except pexpect.EOF:
                return
            else:
                self._take(data)

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Read until `condition` holds; return whether it does within this time."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or not self.is_alive():
                self.read(0.05)
                return condition()
            self.read(0.02)
        return True

    def exit_code(self, seconds: float) -> int | None:
        """Return the exit code once the program has ended, minus the signal's number; None if it has not."""
        self.wait(lambda: not self.is_alive(), seconds)
        self.read(0.1)
        if self.is_alive():
            return None
        self._settings = termios.tcgetattr(self._child.child_fd)
        self._child.close()
        return self._child.exitstatus if self._child.exitstatus is not None else -(self._child.signalstatus or 0)

    def kill(self) -> None:
        """End the program at once."""
        if self.is_alive():
            self._child.kill(signal.SIGKILL)
            self.wait(lambda: not self.is_alive(), 60)
        with contextlib.suppress(OSError):
            self._child.close()

    def unrestored(self) -> list[str]:
        """Return the changes of the terminal that the program did not undo. For use after its end."""
        left = [f"mode {mode} is {'on' if is_on else 'off'}" for mode, is_on in sorted(self._modes.items())
                if is_on != (mode in _DEFAULT_ON)]  # fmt: skip
        if self._kitty:
            left.append(f"{self._kitty} keyboard modes are pushed")
        if self._settings != self._before:
            left.append("echo, line editing, or other settings differ")
        return left

    def _answer(self, text: str) -> None:
        """Send what a terminal answers, such as the position of the cursor."""
        with contextlib.suppress(OSError):
            self._child.send(text.encode())

    def _take(self, data: bytes) -> None:
        self._stream.feed(data)
        data, self._tail = self._tail + data, b""
        cut = data.rfind(b"\x1b", -16)
        if cut >= 0 and not _MODE.match(data, cut) and not _KITTY.match(data, cut):  # it may end in the next block
            data, self._tail = data[:cut], data[cut:]
        for numbers, how in _MODE.findall(data):
            for number in numbers.split(b";"):
                self._modes[int(number)] = how == b"h"
        for how in _KITTY.findall(data):
            self._kitty = max(0, self._kitty + (1 if how == b">" else -1))
