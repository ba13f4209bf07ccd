"""Keys and values of evicted tokens on the disk: pages appended to a few files per session, with an index in SQLite.

A page is flushed to the disk before its row is written, so that every row has a page. A page that does not match the
checksum in its row counts as absent. Each process starts a new file, because the last file of another process may end
with half a page. Beyond the limits, whole files are deleted, oldest first.

A fork has rows of its own for the pages of its past, which stay in the files of the session that wrote them. Such a
file counts for that session, and stays as long as a row refers to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from streamchat.base.errors import StoreError, reason_of
from streamchat.base.paths import fsync, private_dir, private_opener
from streamchat.store.database import Database

_log = logging.getLogger(__name__)
_BLOCK = 1 << 20
_NAME = re.compile(r"[0-9]{6,12}\.pages")
_OWNER = re.compile(r"[^./\\\0][^/\\\0]*")
"""A name of a folder in the archive, and of nothing outside of it."""
MOST_RUNS = 100
"""A query for more runs is one for the range of all; SQLite limits the depth of expressions."""
FILE_BYTES = 32 << 20
"""A file is not appended to beyond this size."""


@dataclass(frozen=True)
class EvictedPage:
    """A row of the index: which evicted tokens a page has."""

    turn: int
    """Number of the turn that evicted them."""
    runs: tuple[tuple[int, int], ...]
    """Their token log indices."""
    ids_checksum: str
    """`checksum_of` their ids."""
    fingerprint: str
    """Fingerprint of the model."""
    dtype: str
    """Dtype of the cache."""
    kind: str
    """How they are stored: native or int8."""
    position: int
    """Absolute position of the first one in the cache."""
    part: str = "evicted"
    """Why they were copied: see `streamchat.cache.evicted.Part`."""
    generation: int = 0
    """Identifies the contents of the cache, with `epoch`; 0 if they are not known."""
    epoch: int = 0


@dataclass(frozen=True)
class _Place:
    owner: str
    """Session whose file it is."""
    file: int
    offset: int
    length: int
    checksum: str


StoredPage = tuple[EvictedPage, _Place]


def checksum_of(data: bytes) -> str:
    """Return the SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def write_data(file: BinaryIO, data: bytes) -> None:
    """Write `data`; `tools.crash` kills the process in the middle of it."""
    file.write(data)


class EvictedPages:
    """The pages of all sessions in one database.

    Args:
        root: The folder for the files; created when the first page is written.
        database: Returns the open database.
    """

    def __init__(self, root: Path, database: Callable[[], Database]) -> None:
        self._root, self._database = root, database
        self._current: dict[str, int] = {}
        """Number of the file that this process appends to, by session."""

    def folder(self, session: str) -> Path:
        """Return the folder of a session's files, whether it exists or not."""
        return self._root / session

    def append(self, session: str, page: EvictedPage, data: bytes, file_bytes: int = FILE_BYTES) -> None:
        """Write a page: first its data, flushed to the disk, then its row.

        Raises:
            StoreError: It cannot be written.
        """
        self._database().check()  # the folder of a deleted database is not created again
        path = self.folder(session)
        try:
            number = self._file_for(session, file_bytes)
            path = self._path(session, number)
            private_dir(path.parent)
            with open(path, "ab", opener=private_opener) as file:
                offset = file.seek(0, os.SEEK_END)
                write_data(file, data)
                file.flush()
                os.fsync(file.fileno())
            if offset == 0:
                fsync(path.parent)
        except OSError as error:
            self._current.pop(session, None)  # the file may end with half a page
            raise StoreError(
                f"evicted tokens could not be archived in {path}: {reason_of(error)}; free some disk space, or set "
                "archive = off"
            ) from error
        values = (page.turn, time.time(), json.dumps(page.runs), page.ids_checksum, page.fingerprint, page.dtype)
        with self._write() as connection:
            added = connection.execute(
                "INSERT INTO evicted (session, turn, at, runs, ids_checksum, fingerprint, dtype, kind, position, part, "
                "generation, epoch, owner, file, start, length, checksum) "
                "SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? "
                "WHERE EXISTS (SELECT 1 FROM sessions WHERE id = ?)",
                (
                    *(session, *values, page.kind, page.position, page.part, page.generation, page.epoch),
                    *(session, number, offset, len(data), checksum_of(data), session),
                ),
            ).rowcount
        if not added:  # the session was deleted while the page waited
            with suppress(OSError):
                self._delete_unused(session)

    def _file_for(self, session: str, file_bytes: int) -> int:
        folder = self.folder(session)
        number = self._current.get(session)
        if number is None:
            number = 1 + max((number for _, number, _ in _files(folder)), default=0)
        else:
            path = self._path(session, number)
            if not path.exists() or path.stat().st_size >= file_bytes:
                number += 1
        self._current[session] = number
        return number

    def _path(self, session: str, number: int) -> Path:
        return self.folder(session) / f"{number:06}.pages"

    def pages(self, session: str, wanted: Sequence[tuple[int, int]] | None = None) -> list[StoredPage]:
        """Return the pages of a session, oldest first, without damaged rows.

        Args:
            session: Its id.
            wanted: Runs [first, stop) of token log indices; only pages with some of them are returned. None for all.
        """
        chosen, values = "", list[int]()
        if wanted is not None:
            if len(wanted) > MOST_RUNS:
                wanted = [(min(first for first, _ in wanted), max(stop for _, stop in wanted))]
            # SQLite reads the runs of a thousand rows in a millisecond; Python would need ten
            overlaps = " OR ".join(
                ["json_extract(value, '$[0]') < ? AND json_extract(value, '$[1]') > ?"] * len(wanted)
            )
            some = f"EXISTS (SELECT 1 FROM json_each(runs) WHERE CASE type WHEN 'array' THEN {overlaps or 'FALSE'} END)"
            chosen = f" AND CASE WHEN json_valid(runs) THEN {some} ELSE TRUE END"
            values = [bound for first, stop in wanted for bound in (stop, first)]
        with self._database().read() as connection:
            query = f"SELECT * FROM evicted WHERE session = ?{chosen} ORDER BY id"
            rows = connection.execute(query, (session, *values)).fetchall()
        return [page for row in rows if (page := _page_of(row)) is not None]

    def read(self, stored: StoredPage) -> bytes | None:
        """Return the data of a page. If it is damaged or missing, log that and return None."""
        place = stored[1]
        path = self._path(place.owner, place.file)
        try:
            with open(path, "rb") as file:
                is_inside = place.offset + place.length <= os.fstat(file.fileno()).st_size
                file.seek(place.offset)
                data = file.read(place.length) if is_inside else b""
        except OSError as error:
            _log.warning("archived tokens of turn %d are missing: %s", stored[0].turn, reason_of(error))
            return None
        if len(data) != place.length or checksum_of(data) != place.checksum:
            _log.warning("archived tokens of turn %d in %s are damaged", stored[0].turn, path)
            return None
        return data

    def drop_from(self, session: str, turn: int) -> None:
        """Drop the pages of turn `turn` and later ones, which are undone."""
        with self._write() as connection:
            connection.execute("DELETE FROM evicted WHERE session = ? AND turn >= ?", (session, turn))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the files of each session."""
        folders = [path for path in self._root.iterdir() if path.is_dir()] if self._root.is_dir() else []
        return {path.name: sum(size for _, _, size in _files(path)) for path in folders}

    def limit(self, session: str, most: int, most_in_all: int, file_bytes: int = FILE_BYTES) -> int:
        """Delete the oldest files of `session` beyond `most` bytes, then of any session beyond `most_in_all` bytes.

        The files to which the next pages are appended, because they are smaller than `file_bytes`, are not deleted.

        Returns:
            The number of the last turn of `session` whose evicted tokens were deleted; 0 if none were.

        Raises:
            StoreError: A file cannot be deleted.
        """
        own = _files(self.folder(session))
        deleted = self._shrink([(at, session, number, size) for at, number, size in own], most, session, file_bytes)
        everything = [
            (at, path.name, number, size)
            for path in (self._root.iterdir() if self._root.is_dir() else ())
            if path.is_dir()
            for at, number, size in _files(path)
        ]
        return max(deleted, self._shrink(everything, most_in_all, session, file_bytes))

    def _shrink(self, files: Sequence[tuple[float, str, int, int]], most: int, session: str, file_bytes: int) -> int:
        total, last = sum(size for *_, size in files), 0
        for _, owner, number, size in sorted(files):
            if total <= most:
                break
            if self._current.get(owner) == number and size < file_bytes:
                continue
            total -= size
            last = max(last, self._delete_file(owner, number, session))
        return last

    def _delete_file(self, owner: str, number: int, session: str) -> int:
        """Delete a file and all its rows, those of forks too; return the last turn of `session` that they have."""
        with self._write() as connection:
            condition = "FROM evicted WHERE owner = ? AND file = ?"
            last = connection.execute(
                f"SELECT max(turn) {condition} AND session = ?", (owner, number, session)
            ).fetchone()[0]
            connection.execute(f"DELETE {condition}", (owner, number))
        path = self._path(owner, number)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"evicted tokens were not archived: the limits are reached, and {path} could not be deleted: "
                f"{reason_of(error)}; delete it, or set archive = off"
            ) from error
        return int(last or 0)

    def delete_orphans(self) -> None:
        """Delete the files of sessions that no longer exist, except for the pages that their forks have.

        Raises:
            OSError: A file cannot be deleted.
        """
        found = self.sizes()  # first: a session that begins meanwhile is no orphan
        with self._database().read() as connection:
            known = {row["id"] for row in connection.execute("SELECT id FROM sessions")}
        orphans = [session for session in found if session not in known]
        for session in orphans:
            self._delete_unused(session)
        if orphans:
            fsync(self._root)

    def _delete_unused(self, owner: str) -> None:
        """Delete the files of a session that was deleted. Of a file with pages of forks, only these keep their bytes.

        Raises:
            OSError: A file cannot be deleted.
        """
        self._current.pop(owner, None)
        with self._database().read() as connection:
            rows = connection.execute(
                "SELECT DISTINCT file, start, length FROM evicted WHERE owner = ? ORDER BY file, start", (owner,)
            ).fetchall()
        used: dict[int, list[tuple[int, int]]] = {}
        for row in rows:
            used.setdefault(row["file"], []).append((row["start"], row["start"] + row["length"]))
        if not used:
            shutil.rmtree(self.folder(owner), ignore_errors=not self.folder(owner).exists())
            return
        for _, number, size in _files(self.folder(owner)):
            if number not in used:
                self._path(owner, number).unlink(missing_ok=True)
            else:
                _erase(self._path(owner, number), gaps(used[number], size))

    def _write(self) -> AbstractContextManager[sqlite3.Connection]:
        return self._database().write()


def gaps(used: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return the parts of `[0, size)` that no part of `used`, in ascending order, has."""
    found, at = [], 0
    for first, stop in [*used, (size, size)]:
        if at < min(first, size):  # a damaged row may be anywhere
            found.append((at, min(first, size)))
        at = max(at, stop)
    return found


def _erase(path: Path, parts: Sequence[tuple[int, int]]) -> None:
    """Overwrite parts of a file by zeros."""
    with open(path, "r+b") as file:
        for first, stop in parts:
            file.seek(first)
            for at in range(first, stop, _BLOCK):
                file.write(bytes(min(_BLOCK, stop - at)))
        file.flush()
        os.fsync(file.fileno())


def _files(folder: Path) -> list[tuple[float, int, int]]:
    """Return (time of the last write, number, bytes) of the files in a session's folder."""
    return sorted(_stats(folder))


def _stats(folder: Path) -> Iterator[tuple[float, int, int]]:
    for path in folder.glob("*.pages"):
        if _NAME.fullmatch(path.name):  # others are not ours
            with suppress(OSError):
                found = path.stat()
                yield found.st_mtime, int(path.stem), found.st_size


def _page_of(row: sqlite3.Row) -> StoredPage | None:
    try:
        runs = tuple((int(first), int(stop)) for first, stop in json.loads(row["runs"]))
        place = _Place(row["owner"] or row["session"], row["file"], row["start"], row["length"], row["checksum"])
        if place.offset < 0 or place.length < 0 or not _OWNER.fullmatch(place.owner):
            raise ValueError(place)
        names = (row["ids_checksum"], row["fingerprint"], row["dtype"], row["kind"], row["position"])
        contents = (row["part"], row["generation"], row["epoch"])
        return EvictedPage(row["turn"], runs, *names, *contents), place
    except (ValueError, TypeError, OverflowError, RecursionError):
        _log.warning("row %s of the archive of evicted tokens is damaged", row["id"])
        return None
