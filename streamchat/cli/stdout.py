"""Distinguish failures to write stdout from all other OS errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from streamchat.base.errors import OutputError, reason_of


class Output:
    """A text stream that raises `OutputError` if it cannot be written; a closed pipe still raises `BrokenPipeError`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _as_output_error(error) from error

    def flush(self) -> None:
        """Flush the buffer."""
        try:
            self._stream.flush()
        except OSError as error:
            raise _as_output_error(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _as_output_error(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):
        return error
    return OutputError(f"stdout cannot be written ({reason_of(error)}); the output is incomplete")


@contextmanager
def guarded_output() -> Iterator[None]:
    """Replace `sys.stdout` by an `Output`, or by the null device if the parent process closed it."""
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


def drop_output() -> None:
    """Redirect stdout to the null device: Python would report the error again when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
