"""Digests of whole files, remembered while device, inode, size and times of the file stay what they were.

A digest covers every byte. Hashing takes about a second per GB and core, so a file is hashed when it is new or touched,
and a start with an unchanged model only asks the file system.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from streamchat.base import paths
from streamchat.base.errors import ModelNotFoundError, short
from streamchat.base.progress import Progress, silent

_log = logging.getLogger(__name__)

BLOCK = 1 << 24
"""Bytes that are hashed as one; the digest of a file is that of its blocks' digests, so that they share the cores."""
THREADS = 4
LARGE = 1 << 30
"""Bytes from which on progress is reported in numbers; smaller files take a second."""
SETTLED_NS = 2_000_000_000
"""A younger file may change again within one tick of the file system's clock, so its digest is not remembered."""


def folder_digest(folder: Path, files: Iterable[Path], *, name: str, progress: Progress = silent) -> str:
    """Return one digest of `files`: of their names relative to `folder` and of every byte.

    Args:
        folder: Holds the files.
        files: In any order; links are followed.
        name: Of the model, for progress.
        progress: Called with bytes; may raise to cancel.

    Raises:
        ModelNotFoundError: A file cannot be read.
    """
    parts = {file.relative_to(folder).as_posix(): file_digest(file, name=name, progress=progress) for file in files}
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()


def file_digest(file: Path, *, name: str, progress: Progress = silent) -> str:
    """The digest of every byte of `file`; arguments and errors as of `folder_digest`."""
    with _readable(file):
        place = file.resolve(strict=True)
        before = _state(place)
    known = _remembered(place)
    if known is not None and known[0] == before:
        return known[1]
    digest = _hash(place, before[2], f"Checking {name} (once)", progress)
    with _readable(file):
        is_same = _state(place) == before
    if is_same and time.time_ns() - max(before[3:]) > SETTLED_NS:
        _remember(place, before, digest)
    return digest


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn an OSError of the block into a sentence about `file`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = short(getattr(error, "strerror", None) or error)
        raise ModelNotFoundError(f"{file} cannot be read: {reason}; fetch it again or make it readable") from error


def _state(file: Path) -> tuple[int, ...]:
    """(device, inode, size, mtime, ctime): what differs when a file was written to or exchanged.

    ctime is there because mtime can be set back.
    """
    about = file.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _hash(file: Path, size: int, stage: str, progress: Progress) -> str:
    whole = hashlib.sha256(str(size).encode())

    def block(at: int) -> bytes:
        with _readable(file), file.open("rb") as stream:
            stream.seek(at)
            return hashlib.sha256(stream.read(BLOCK)).digest()

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for number, digest in enumerate(pool.map(block, range(0, size, BLOCK))):
                whole.update(digest)
                done = min((number + 1) * BLOCK, size)
                progress(stage, *((done, size, "bytes") if size >= LARGE else (0, 0, "")))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return whole.hexdigest()


def _memory_of(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(file)).hexdigest()[:32]
    return paths.cache_dir() / "digests" / f"{name}.json"


def _remembered(file: Path) -> tuple[tuple[int, ...], str] | None:
    try:
        known = json.loads(_memory_of(file).read_text(encoding="utf-8"))
        return tuple(known["state"]), str(known["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(file: Path, state: tuple[int, ...], digest: str) -> None:
    memory = _memory_of(file)
    try:
        paths.private_dir(memory.parent)
        handle, temporary = tempfile.mkstemp(dir=memory.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({"state": state, "digest": digest}, stream)
        os.replace(temporary, memory)
    except OSError as error:
        _log.warning("the digest of %s could not be kept, so each start computes it: %s", file, error)
