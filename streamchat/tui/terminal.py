"""While the app runs, only the app writes to the terminal; all other output goes to the log file.

Textual captures `print`, but not handlers and libraries that hold an older `sys.stderr`, nor native code that writes to
the file descriptor.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from textual.driver import Driver

from streamchat.base import paths
from streamchat.telemetry.log_file import log_path


@contextmanager
def guarded_terminal() -> Iterator[None]:
    """Redirect descriptors 1 and 2 to the log file; the app gets the terminal as `sys.__stderr__`.

    Restores everything on exit. Does nothing if the descriptors are not a terminal (tests, pipes).
    """
    terminal = next((fd for fd in (2, 1) if _is_terminal(fd)), None)
    if terminal is None or os.name != "posix":
        yield
        return
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    names = ("stderr", "__stderr__", "stdout", "__stdout__")
    streams = {name: getattr(sys, name) for name in names}
    screen = io.TextIOWrapper(
        io.BufferedWriter(TerminalFile(os.dup(terminal), "w")), encoding="utf-8", errors="replace"
    )
    log = _open_log()
    sized: _LogWithSize | None = None
    try:
        _flush(streams.values())
        for fd in saved:
            os.dup2(log, fd)
        # Textual draws on __stderr__ and prints tracebacks to stderr after restoring the screen
        sys.stderr = sys.__stderr__ = screen  # type: ignore[misc]
        # Textual reads the terminal size from __stdout__
        sized = _LogWithSize(log, screen.fileno())
        sys.__stdout__ = sized  # type: ignore[misc]
        yield
    finally:
        _flush([*streams.values(), screen])
        for name, stream in streams.items():
            setattr(sys, name, stream)
        for fd, copy in saved.items():
            os.dup2(copy, fd)
            os.close(copy)
        os.close(log)
        for stream in (sized, screen):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def guarded_driver(chosen: type[Driver]) -> type[Driver]:
    """Replace the Linux and macOS driver by `KeyboardDriver`; other drivers (Windows, browser, tests) are unchanged."""
    if chosen.__module__ != "textual.drivers.linux_driver":
        return chosen
    from streamchat.tui.keyboard import KeyboardDriver

    return KeyboardDriver


class TerminalFile(io.FileIO):
    """The terminal; drops what is written after it was closed.

    An error would end Textual's thread that writes, and its loop would then wait forever for room in the thread's
    queue, without answering a signal.
    """

    def write(self, data: Any) -> int:
        """Write `data`, or drop it if the terminal was closed."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


class _LogWithSize(io.TextIOWrapper):
    """Writes to the log, but `fileno` returns the terminal."""

    def __init__(self, log: int, terminal: int) -> None:
        super().__init__(io.FileIO(os.dup(log), "a"), encoding="utf-8", errors="replace", write_through=True)
        self._terminal = os.dup(terminal)

    def fileno(self) -> int:
        """Descriptor of the terminal."""
        return self._terminal

    def close(self) -> None:
        """Close the log and the terminal descriptor."""
        if not self.closed:
            os.close(self._terminal)
        super().close()


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _open_log() -> int:
    try:
        paths.private_dir(log_path().parent)
        return os.open(log_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _flush(streams: object) -> None:
    for stream in streams:  # type: ignore[attr-defined]
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
