"""Distinguish failures to write stdout from all other OS errors."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from streamchat.base.errors import HungUpError, OutputError, reason_of

HUNG_UP = "the terminal was closed"


class Output:
    """A text or binary stream that raises `OutputError` if it cannot be written.

    A closed pipe still raises `BrokenPipeError`.
    """

    def __init__(self, stream: Any, is_terminal: bool | None = None) -> None:
        self._stream = stream
        self._is_terminal: bool = stream.isatty() if is_terminal is None else is_terminal  # unknown once it is closed

    def write(self, data: Any) -> int:
        """Write `data`."""
        try:
            return int(self._stream.write(data))
        except OSError as error:
            raise self._told(error) from error

    def flush(self) -> None:
        """Flush the buffer."""
        try:
            self._stream.flush()
        except OSError as error:
            raise self._told(error) from error

    @property
    def buffer(self) -> Output:
        """The binary stream below; prompt-toolkit writes there."""
        return Output(self._stream.buffer, self._is_terminal)

    def is_hung_up(self) -> bool:
        """Return whether the stream was a terminal and has been closed."""
        return self._is_terminal and not self._stream.isatty()

    def _told(self, error: OSError) -> Exception:
        if isinstance(error, BrokenPipeError):
            return error
        if self._is_terminal and error.errno == errno.EIO:
            return HungUpError(HUNG_UP)
        return OutputError(f"stdout cannot be written ({reason_of(error)}); the output is incomplete")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_hung_up(error: Exception) -> bool:
    """Return whether `error`, for example a `termios.error`, was raised because the terminal was closed."""
    return error.args[:1] == (errno.EIO,) and isinstance(sys.stdout, Output) and sys.stdout.is_hung_up()


@contextmanager
def guarded_output() -> Iterator[None]:
    """Replace `sys.stdout` by an `Output`, or by the null device if the parent process closed it."""
    _occupy_standard_descriptors()
    before = sys.stdout
    if before is None:
        with open(os.devnull, "w", encoding="utf-8") as null:
            sys.stdout = null
            yield
        return
    sys.stdout = cast(TextIO, Output(before))
    try:
        yield
    finally:
        sys.stdout = before


def _occupy_standard_descriptors() -> None:
    """Open the null device for each of the descriptors 0 to 2 that the parent process closed.

    Otherwise the next files and sockets get these numbers, and native libraries print into them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
            os.set_inheritable(descriptor, True)


def drop_output() -> None:
    """Redirect stdout to the null device. Otherwise Python reports the error again when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
