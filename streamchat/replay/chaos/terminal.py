"""The output of the measured process: on a pseudo-terminal, or in a pipe if the system has none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from streamchat.replay.chaos.kinds.resize import USUAL

KEPT = 20_000
"""Bytes of the latest output that are kept, to report why the process ended."""
_CODES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[ -/]*[0-~])")


class Terminal:
    """Starts a process on a pseudo-terminal, reads what it draws, and changes the size.

    Args:
        command: Program and arguments.
        environment: Environment of the process.
        descriptor: Open file that the process inherits.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], descriptor: int) -> None:
        import pty

        self._main, theirs = pty.openpty()
        self._set_size(*USUAL)
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | {"TERM": "xterm-256color"},
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl+C goes to the supervisor only
        )
        os.close(theirs)
        self._tail = b""
        self._reader = threading.Thread(target=self._drain, name="streamchat-drain", daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        with suppress(OSError):  # Linux reports the end as an error
            while data := os.read(self._main, 65_536):
                self._tail = (self._tail + data)[-KEPT:]

    def _set_size(self, columns: int, rows: int) -> None:
        import termios

        termios.tcsetwinsize(self._main, (rows, columns))

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the terminal, and send the signal that tells so."""
        with suppress(OSError):
            self._set_size(columns, rows)
            self.process.send_signal(signal.SIGWINCH)

    def close(self) -> None:
        """Wait until all output is read. The process has ended."""
        self._reader.join(5.0)
        os.close(self._main)

    @property
    def last_line(self) -> str:
        """The last line of the output, without control sequences."""
        text = _CODES.sub("", self._tail.decode("utf-8", "replace"))
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


class Pipe:
    """Starts a process without a terminal. The arguments are those of `Terminal`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], descriptor: int) -> None:
        import tempfile

        self._output: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            env=environment,
            pass_fds=(descriptor,),
            start_new_session=True,
        )

    def close(self) -> None:
        """Read the end of the output. The process has ended."""
        self._output.seek(max(0, self._output.tell() - KEPT))
        lines = self._output.read().decode("utf-8", "replace").splitlines()
        self.last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
        self._output.close()
