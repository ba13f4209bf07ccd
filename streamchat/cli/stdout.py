"""A stdout whose write failures can be told apart from all other failures of the system."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from streamchat.base.errors import OutputError


class Output:
    """A text stream that raises `OutputError` when it cannot be written; a closed pipe is `BrokenPipeError` as ever."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _told(error) from error

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            raise _told(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _told(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):
        return error
    return OutputError(f"stdout cannot be written ({error.strerror or error}); the output is incomplete")


@contextmanager
def guarded_output() -> Iterator[None]:
    """`sys.stdout` is an `Output`. One that was closed by who started the process leads nowhere."""
    before = sys.stdout
    if before is None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            sys.stdout = nowhere
            yield
        return
    sys.stdout = cast(TextIO, Output(before))
    try:
        yield
    finally:
        sys.stdout = before


def drop_output() -> None:
    """Lead stdout nowhere from now on: Python would complain once more when it flushes at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
