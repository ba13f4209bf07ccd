"""The turns file of a run. Rows that cannot be written, because the disk is full, wait in memory for room."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamchat.base.atomic_files import advice_on
from streamchat.base.errors import reason_of
from streamchat.base.formatting import plural


class TurnLog:
    """Appends rows to a file of JSON lines. Every row is flushed to the disk, unless the disk refuses it.

    Args:
        path: The file; a partial last line must have been removed.
        report: Called with a sentence, and whether it is a warning: when rows cannot be written, and when they are.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, report: Callable[[str, bool], None]) -> None:
        self._path, self._report = path, report
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._end = os.fstat(self._file).st_size
        """Size of the file with its complete rows."""
        self._waiting: list[bytes] = []
        self._is_refused = False

    def append(self, row: dict[str, Any]) -> None:
        """Write a row, after those that still wait."""
        self._waiting.append(json.dumps(row).encode() + b"\n")
        self._write()

    def close(self) -> None:
        """Write the rows that wait, and close the file; report how many rows could not be written."""
        try:
            if self._waiting:
                self._write()
            if self._waiting:
                lost = plural(len(self._waiting), "turn")
                self._report(f"{self._path} lacks the last {lost}; the session has them", True)
        finally:
            os.close(self._file)

    def _write(self) -> None:
        data = b"".join(self._waiting)
        try:
            if self._is_refused:
                os.ftruncate(self._file, self._end)  # removes part of a row
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            if not self._is_refused:
                self._is_refused = True
                why = f"{reason_of(error)}; {advice_on(error.errno)}"
                self._report(f"{self._path} cannot be written ({why}); its rows are written once there is room", True)
            return
        self._end += len(data)
        self._waiting.clear()
        if self._is_refused:
            self._is_refused = False
            self._report(f"{self._path} is written again, with all rows since the failure", False)
