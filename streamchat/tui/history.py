"""Input history for the arrow keys, saved across restarts in a private file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from streamchat.base import paths
from streamchat.base.sanitize import printable

MAX_ENTRIES = 2000
"""Older entries are dropped when the file is opened."""


class PromptHistory:
    """Entries, oldest first, with a cursor. File errors disable saving instead of raising.

    Args:
        path: JSON-lines file; None keeps entries in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.problem = ""
        """Notice if entries are not saved; else ''."""
        self._entries = self._load()
        self._index = len(self._entries)
        self._draft = ""

    @classmethod
    def open(cls, wanted: bool) -> PromptHistory:
        """Open the user's history file, or an in-memory history if `wanted` is False."""
        return cls(paths.state_dir() / "history.jsonl" if wanted else None)

    @property
    def entries(self) -> list[str]:
        """All entries, oldest first."""
        return list(self._entries)

    def add(self, text: str) -> None:
        """Append `text`, unless it repeats the last entry, and move to the end."""
        text = printable(text).strip()
        if text and (not self._entries or self._entries[-1] != text):
            self._entries.append(text)
            self._append(text)
        self.rewind()

    def rewind(self) -> None:
        """Move to the end and discard the draft."""
        self._index, self._draft = len(self._entries), ""

    def older(self, current: str) -> str | None:
        """Move to the previous entry; None at the oldest. At the end, `current` (the input) is saved as the draft."""
        if self._index == 0:
            return None
        if self._index == len(self._entries):
            self._draft = current
        self._index -= 1
        return self._entries[self._index]

    def newer(self) -> str | None:
        """Move to the next entry, finally to the draft; None at the draft."""
        if self._index == len(self._entries):
            return None
        self._index += 1
        return self._draft if self._index == len(self._entries) else self._entries[self._index]

    def _load(self) -> list[str]:
        if self._path is None:
            return []
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._disable(error)
            return []
        entries = [text for line in lines if (text := _text_of(line))]
        if len(lines) > MAX_ENTRIES * 5 // 4:
            entries = entries[-MAX_ENTRIES:]
            self._rewrite(entries)
        return entries[-MAX_ENTRIES:]

    def _append(self, text: str) -> None:
        if self._path is None or self.problem:
            return
        try:
            paths.private_dir(self._path.parent)
            with open(_private(self._path, os.O_APPEND), "a", encoding="utf-8") as file:
                file.write(_line_of(text))
        except OSError as error:
            self._disable(error)

    def _rewrite(self, entries: list[str]) -> None:
        assert self._path is not None
        fresh = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            with open(_private(fresh, os.O_TRUNC), "w", encoding="utf-8") as file:
                file.writelines(map(_line_of, entries))
            os.replace(fresh, self._path)
        except OSError as error:
            self._disable(error)

    def _disable(self, error: OSError) -> None:
        self.problem = f"input history is disabled: {self._path} ({error.strerror or type(error).__name__})"


def _private(path: Path, how: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
    if hasattr(os, "fchmod"):  # an existing file may have wider permissions
        os.fchmod(descriptor, 0o600)
    return descriptor


def _line_of(text: str) -> str:
    return json.dumps({"time": int(time.time()), "text": text}, ensure_ascii=False) + "\n"


def _text_of(line: str) -> str:
    """The text of a line; '' if the line is invalid, for example truncated by a crash."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        return ""
    return text if isinstance(text, str) else ""
