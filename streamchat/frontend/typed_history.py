"""The input history: one private file, shared by the app, the prompt, and all processes.

Each line of `typed.jsonl` is an object with `time` (Unix time) and `text`. If there is no such file, the two files of
version 0.1, `history.jsonl` of the app and `history` of the prompt, are read into it and left in place.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from streamchat.base import paths
from streamchat.base.atomic_files import remove_partial, write_text
from streamchat.base.errors import reason_of
from streamchat.base.jsonlines import json_line, split_lines
from streamchat.base.sanitize import printable, without_blank_ends

MAX_ENTRIES = 5000
MAX_CHARACTERS = 8_000_000
"""The oldest entries above one of these limits are dropped when the file is opened, very long ones first."""
MAX_LENGTH = MAX_CHARACTERS // 8
"""What is very long, in characters. The newest entry is kept whatever its length."""
PATIENCE_S = 0.5
"""Maximum wait for another process, which has the lock only for one write."""

Entry = tuple[float, str]
"""(Unix time, text)."""


class TypedHistory:
    """What was typed, oldest first. File errors disable saving instead of raising.

    Args:
        path: The file; None keeps entries in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.problem = ""
        """Notice if entries are not saved; else ''."""
        self.entries: list[str] = []
        if path is not None:
            with self._saving():
                paths.private_dir(path.parent)
                with _locked(path) as alone:
                    if alone:
                        remove_partial(path)
                    _import_and_trim(path)
            with self._saving():
                self.entries = [text for _, text in _entries_of(path)]

    @classmethod
    def open(cls, wanted: bool) -> Self:
        """Open the user's history, or one in memory if `wanted` is False."""
        return cls(paths.state_dir() / "typed.jsonl" if wanted else None)

    def add(self, text: str) -> None:
        """Append `text`, unless it is blank or repeats the last entry."""
        text = without_blank_ends(printable(text))
        if not text.strip() or text in self.entries[-1:]:
            return
        self.entries.append(text)
        if self._path is not None and not self.problem:
            with self._saving():
                _append(self._path, _line_of((time.time(), text)))

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, NotImplementedError) as error:  # the latter if the file system has no locks
            self.problem = self.problem or f"input history is disabled: {self._path} ({reason_of(error)})"


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of the file; yield whether it is held.

    If another process has it for longer than `PATIENCE_S`, continue without it.
    """
    lock = FileLock(path.with_suffix(".lock"), timeout=PATIENCE_S, mode=0o600, is_singleton=False)
    with suppress(Timeout):
        lock.acquire(poll_interval=0.01)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _import_and_trim(path: Path) -> None:
    """Read the files of version 0.1 if `path` does not exist; rewrite it if it exceeds the limits."""
    is_new = not path.exists()
    entries = _old_entries(path.parent) if is_new else _entries_of(path)
    kept = _within_limits(entries)
    if len(kept) < len(entries) or (is_new and kept):
        write_text(path, "".join(map(_line_of, kept)), durable=True)


def _within_limits(entries: list[Entry]) -> list[Entry]:
    """The newest entries within the limits. One very long entry does not displace many others."""
    if len(entries) <= MAX_ENTRIES and sum(len(text) for _, text in entries) <= MAX_CHARACTERS:
        return entries
    short = [entry for entry in entries if len(entry[1]) <= MAX_LENGTH]
    totals = accumulate(len(text) for _, text in reversed(short))
    count = min(MAX_ENTRIES, sum(total <= MAX_CHARACTERS for total in totals))
    newest = entries[-1:] if len(entries[-1][1]) > MAX_LENGTH else []
    return [*short[len(short) - count :], *newest]


def _append(path: Path, line: str) -> None:
    """Append a line in one write, on a line of its own even if a crash cut off the last one.

    Raises:
        OSError: Not all of it can be written; the file is as before.
    """
    with _locked(path), open(path, "a+b", buffering=0, opener=paths.private_opener) as file:
        if hasattr(os, "fchmod"):  # an existing file may have wider permissions
            os.fchmod(file.fileno(), 0o600)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        is_torn = size > 0 and file.read(1) != b"\n"
        added = b"\n" * is_torn + line.encode()
        if file.write(added) < len(added):  # a disk that gets full while writing raises no error
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _line_of(entry: Entry) -> str:
    return json_line({"time": round(entry[0], 3), "text": entry[1]}) + "\n"


def _entries_of(path: Path) -> list[Entry]:
    """Read the shared file, or that of the app of version 0.1. Invalid lines are skipped, for example one cut off."""
    entries, at = list[Entry](), 0.0
    for line in _lines_of(path):
        with suppress(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            record = json.loads(line)
            at = float(record.get("time", at))
            if record["text"].strip():
                entries.append((at, printable(record["text"])))
    return entries


def _old_entries(folder: Path) -> list[Entry]:
    """What was typed in version 0.1, in order of time; the app's file has whole seconds."""
    entries = [*_entries_of(folder / "history.jsonl"), *_old_prompt_entries(folder / "history")]
    return sorted(entries, key=lambda entry: entry[0])


def _old_prompt_entries(path: Path) -> list[Entry]:
    """Read a history file of prompt-toolkit: a comment with the local time, then the lines of the entry after a +."""
    entries, at, lines = list[Entry](), 0.0, list[str]()
    for line in [*_lines_of(path), ""]:
        if line.startswith("+"):
            lines.append(line[1:])
            continue
        if text := printable("\n".join(lines)).strip("\n"):
            entries.append((at, text))
        lines = []
        if line.startswith("# "):
            with suppress(ArithmeticError, OSError, ValueError):
                at = datetime.fromisoformat(line[2:]).timestamp()
    return entries


def _lines_of(path: Path) -> list[str]:
    try:
        return split_lines(path.read_bytes().decode("utf-8", errors="replace"))
    except FileNotFoundError:
        return []
