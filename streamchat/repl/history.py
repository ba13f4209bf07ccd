"""Input history across restarts: a private file, or memory if the file is disabled or not writable."""

from __future__ import annotations

import os
from collections.abc import Iterable

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from streamchat.base import paths
from streamchat.base.sanitize import printable

MAX_ENTRIES = 5000
"""Older entries are dropped when a session starts."""


class PrivateHistory(FileHistory):
    """A history file that only the user can read. An entry that cannot be written is dropped."""

    def __init__(self) -> None:
        """Create or open the file; raises OSError on failure."""
        path = paths.private_dir(paths.state_dir()) / "history"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if hasattr(os, "fchmod"):  # not on Windows
                os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        super().__init__(str(path))
        self._trim()

    def store_string(self, string: str) -> None:
        """Append an entry."""
        try:
            super().store_string(printable(string))
        except OSError:
            return

    def load_history_strings(self) -> Iterable[str]:
        """The entries, newest first."""
        return [text for text in super().load_history_strings() if text.strip()]

    def _trim(self) -> None:
        entries = list(self.load_history_strings())
        if len(entries) <= MAX_ENTRIES:
            return
        fresh = f"{self.filename!s}.new"
        os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        rewritten = FileHistory(fresh)
        for text in reversed(entries[: MAX_ENTRIES * 4 // 5]):
            rewritten.store_string(text)
        os.replace(fresh, str(self.filename))


def make_history(wanted: bool) -> tuple[History, str]:
    """Return the history and, if it cannot be saved, a notice for the user; else ''."""
    if not wanted:
        return InMemoryHistory(), ""
    try:
        return PrivateHistory(), ""
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return InMemoryHistory(), f"input history is disabled: {paths.state_dir() / 'history'} ({reason})"
