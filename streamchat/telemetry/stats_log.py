"""`--stats-json FILE`: one line per turn, each a JSON object."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.paths import private_opener, user_path


class StatsLog:
    """Appends to the file and flushes after each line, so that a run can be watched and a crash loses nothing.

    Lines of earlier runs are kept. `write` may be called from any thread and never raises: a full disk must not end a
    chat. `failure` reports the error afterwards.

    Raises:
        ConfigError: The file cannot be opened for writing.
    """

    def __init__(self, path: str) -> None:
        self.failure = ""
        """One sentence after a write failed; nothing is written after that."""
        self._path = path
        self._lock = threading.Lock()
        try:
            self._file = open(user_path(path), "a", encoding="utf-8", opener=private_opener)  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:  # null bytes
            raise ConfigError(
                f"stats_json = {path!r} cannot be written ({reason_of(error)}); give another file"
            ) from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        with self._lock:
            if self.failure or self._file.closed:
                return
            try:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            except OSError as error:
                self.failure = f"{self._path} is incomplete: {reason_of(error)}"

    def close(self) -> None:
        """Close the file; later records are dropped."""
        with self._lock:
            try:
                self._file.close()
            except OSError as error:
                self.failure = self.failure or f"{self._path} is incomplete: {reason_of(error)}"
