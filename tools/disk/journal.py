"""Reads the log of `shim.c` as changes of files and folders, which have numbers like inodes."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

_HEAD = struct.Struct("@IIIiiqQ")
"""`struct head` of `shim.c`."""
ROOT = 0
"""Number of the folder that was recorded."""


class Call(IntEnum):
    """Kinds of records, with the numbers of `shim.c`."""

    OPEN = 1
    CLOSE = 2
    DUP = 3
    WRITE = 4
    TRUNCATE = 5
    SYNC = 6
    RENAME = 7
    UNLINK = 8
    LINK = 9
    MKDIR = 10
    RMDIR = 11
    MAP = 12
    MARK = 13


@dataclass(frozen=True)
class Data:
    """Bytes written into a file."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Size:
    """A new size of a file, which is truncated or extended with zeros."""

    file: int
    size: int


@dataclass(frozen=True)
class Names:
    """Folder entries that change in one step: (folder, name, number of the new entry or None)."""

    entries: tuple[tuple[int, str, int | None], ...]

    @property
    def folders(self) -> frozenset[int]:
        """The folders."""
        return frozenset(folder for folder, _, _ in self.entries)


@dataclass(frozen=True)
class Sync:
    """A file or a folder was flushed to the disk."""

    number: int


@dataclass(frozen=True)
class Mark:
    """A mark that the recorded process wrote."""

    text: str


Change = Data | Size | Names | Sync | Mark


@dataclass
class _Live:
    """What the process sees: folders with their entries, and open descriptors."""

    root: str
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    descriptors: dict[int, int] = field(default_factory=dict)
    mapped: set[int] = field(default_factory=set)
    created: int = ROOT

    def new(self) -> int:
        self.created += 1
        return self.created

    def parent(self, path: str) -> tuple[int, str] | None:
        """Return the folder and the name of a path; None for the root and for paths outside of it."""
        parts = os.path.relpath(path, self.root).split("/")
        if parts[0] in ("..", "."):
            return None
        folder = ROOT
        for part in parts[:-1]:
            folder = self.folders[folder][part]
        return folder, parts[-1]

    def find(self, path: str) -> int | None:
        place = self.parent(path)
        return ROOT if place is None else self.folders[place[0]].get(place[1])

    def change(self, *entries: tuple[int, str, int | None]) -> Names:
        for folder, name, number in entries:
            if number is None:
                self.folders[folder].pop(name, None)
            else:
                self.folders[folder][name] = number
        return Names(entries)


@dataclass(frozen=True)
class Recording:
    """A log.

    Args:
        changes: All changes, in order.
        folders: Numbers of the folders.
        mapped: Numbers of files that were changed through mapped memory, which no log can show.
    """

    changes: list[Change]
    folders: frozenset[int]
    mapped: frozenset[int]


def read(log: Path, root: Path) -> Recording:
    """Read the log of a process that recorded the folder `root`, which was empty at the start."""
    live = _Live(str(root))
    changes = [change for record in _records(log.read_bytes()) for change in _changes(live, *record)]
    return Recording(changes, frozenset(live.folders), frozenset(live.mapped))


_Record = tuple[int, int, int, int, str, str, bytes]


def _records(data: bytes) -> Iterator[_Record]:
    at = 0
    while at < len(data):
        operation, first, second, fd, flags, offset, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        one, other = os.fsdecode(data[at : at + first]), os.fsdecode(data[at + first : at + first + second])
        at += first + second
        yield operation, fd, flags, offset, one, other, data[at : at + size]
        at += size


def _changes(
    live: _Live, operation: int, fd: int, flags: int, offset: int, path: str, other: str, data: bytes
) -> Iterator[Change]:
    match operation:
        case Call.OPEN:
            yield from _opened(live, fd, flags, bool(offset), path)
        case Call.CLOSE:
            live.descriptors.pop(fd, None)
        case Call.DUP:
            live.descriptors[flags] = live.descriptors[fd]
        case Call.WRITE:
            yield Data(live.descriptors[fd], offset, data)
        case Call.TRUNCATE:
            yield Size(live.descriptors[fd], offset)
        case Call.SYNC:
            yield Sync(live.descriptors[fd])
        case Call.MAP:
            live.mapped.add(live.descriptors[fd])
        case Call.MARK:
            yield Mark(data.decode())
        case _:
            yield from _renamed(live, operation, path, other)


def _opened(live: _Live, fd: int, flags: int, is_new: bool, path: str) -> Iterator[Change]:
    if flags & os.O_TMPFILE == os.O_TMPFILE:  # a file without a name
        live.descriptors[fd] = live.new()
        return
    number = live.find(path)
    if is_new:
        place = live.parent(path)
        assert place is not None, path
        assert number is None, f"{path} was created twice"
        number = live.new()
        yield live.change((*place, number))
    assert number is not None, f"{path} was opened, and its creation is not in the log"
    live.descriptors[fd] = number
    if flags & os.O_TRUNC and not is_new:
        yield Size(number, 0)


def _renamed(live: _Live, operation: int, path: str, other: str) -> Iterator[Change]:
    place, target = live.parent(path), live.parent(other) if other else None
    assert place is not None, path
    match operation:
        case Call.RENAME:
            assert target is not None, f"{path} was renamed to {other}, which is not recorded"
            number = live.folders[place[0]][place[1]]
            if (*place,) != (*target,):
                yield live.change((*place, None), (*target, number))
        case Call.UNLINK | Call.RMDIR:
            yield live.change((*place, None))
        case Call.LINK:
            assert target is not None, other
            yield live.change((*target, live.folders[place[0]][place[1]]))
        case Call.MKDIR:
            number = live.new()
            live.folders[number] = {}
            yield live.change((*place, number))
        case _:
            raise ValueError(f"operation {operation} in the log")
