"""What the user typed, walked with the arrow keys and kept across restarts in a private file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from streamchat.base import paths
from streamchat.base.sanitize import printable

MAX_ENTRIES = 2000
"""Older entries are dropped when the file is next opened."""


class PromptHistory:
    """Entries, oldest first, and a place among them. Never raises for a file that cannot be read or written.

    Args:
        path: A JSON-lines file; None keeps the entries in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.problem = ""
        """Why entries are not kept, in words; empty while all is well."""
        self._entries = self._load()
        self._place = len(self._entries)
        self._draft = ""

    @classmethod
    def open(cls, wanted: bool) -> PromptHistory:
        """The user's history, or one in memory where it is not wanted."""
        return cls(paths.state_dir() / "history.jsonl" if wanted else None)

    @property
    def entries(self) -> list[str]:
        """All entries, oldest first."""
        return list(self._entries)

    def add(self, text: str) -> None:
        """Remember `text` (but not twice in a row) and go to the end."""
        text = printable(text).strip()
        if text and (not self._entries or self._entries[-1] != text):
            self._entries.append(text)
            self._append(text)
        self.rewind()

    def rewind(self) -> None:
        """Go to the end: what is in the input is the draft."""
        self._place, self._draft = len(self._entries), ""

    def older(self, current: str) -> str | None:
        """The entry before; None at the oldest one. `current`, what is in the input, is kept as the draft."""
        if self._place == 0:
            return None
        if self._place == len(self._entries):
            self._draft = current
        self._place -= 1
        return self._entries[self._place]

    def newer(self) -> str | None:
        """The entry after, at last the draft; None when already there."""
        if self._place == len(self._entries):
            return None
        self._place += 1
        return self._draft if self._place == len(self._entries) else self._entries[self._place]

    def _load(self) -> list[str]:
        if self._path is None:
            return []
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._give_up(error)
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
            self._give_up(error)

    def _rewrite(self, entries: list[str]) -> None:
        assert self._path is not None
        fresh = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            with open(_private(fresh, os.O_TRUNC), "w", encoding="utf-8") as file:
                file.writelines(map(_line_of, entries))
            os.replace(fresh, self._path)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.problem = f"what you type is not remembered: {self._path} ({error.strerror or type(error).__name__})"


def _private(path: Path, how: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
    if hasattr(os, "fchmod"):  # a file made by hand may be readable by others
        os.fchmod(descriptor, 0o600)
    return descriptor


def _line_of(text: str) -> str:
    return json.dumps({"time": int(time.time()), "text": text}, ensure_ascii=False) + "\n"


def _text_of(line: str) -> str:
    """The text of a line; '' for one that a crash cut in half or that somebody else wrote."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        return ""
    return text if isinstance(text, str) else ""
