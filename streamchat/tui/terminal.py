"""While the app is on, only the app writes to the terminal; everything else lands in the log file.

Textual already catches `print`. What it cannot catch are handlers and libraries that kept an older `sys.stderr`, and
native code that writes to the descriptor itself.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from textual.driver import Driver

from streamchat.base import paths
from streamchat.telemetry.log_file import log_path


@contextmanager
def guarded_terminal() -> Iterator[None]:
    """Lead descriptors 1 and 2 into the log file and give the terminal to the app alone, as `sys.__stderr__`.

    Afterwards all is as before. Does nothing where the descriptors are not a terminal's (tests, pipes).
    """
    terminal = next((fd for fd in (2, 1) if _is_terminal(fd)), None)
    if terminal is None or os.name != "posix":
        yield
        return
    kept = {fd: os.dup(fd) for fd in (1, 2)}
    names = ("stderr", "__stderr__", "stdout", "__stdout__")
    streams = {name: getattr(sys, name) for name in names}
    screen = os.fdopen(os.dup(terminal), "w", encoding="utf-8", errors="replace")
    log = _open_log()
    sized: _LogWithSize | None = None
    try:
        _flush(streams.values())
        for fd in kept:
            os.dup2(log, fd)
        # Textual draws on __stderr__; a traceback it prints once the screen is restored goes to stderr
        sys.stderr = sys.__stderr__ = screen  # type: ignore[misc]
        # and it asks __stdout__ for the terminal's size
        sized = _LogWithSize(log, screen.fileno())
        sys.__stdout__ = sized  # type: ignore[misc]
        yield
    finally:
        _flush([*streams.values(), screen])
        for name, stream in streams.items():
            setattr(sys, name, stream)
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)
        os.close(log)
        for stream in (sized, screen):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def guarded_driver(chosen: type[Driver]) -> type[Driver]:
    """`KeyboardDriver` instead of the driver of Linux and macOS; any other (Windows, browser, test) as it is."""
    if chosen.__module__ != "textual.drivers.linux_driver":
        return chosen
    from streamchat.tui.keyboard import KeyboardDriver

    return KeyboardDriver


class _LogWithSize(io.TextIOWrapper):
    """Writes to the log, but says that it is the terminal when asked for its descriptor."""

    def __init__(self, log: int, terminal: int) -> None:
        super().__init__(io.FileIO(os.dup(log), "a"), encoding="utf-8", errors="replace", write_through=True)
        self._terminal = os.dup(terminal)

    def fileno(self) -> int:
        """Of the terminal."""
        return self._terminal

    def close(self) -> None:
        """Close both."""
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
