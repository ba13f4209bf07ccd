"""Digests of whole files, cached until the device, inode, size or times of a file change.

A digest covers every byte. Hashing takes about a second per GB and core, so only new or modified files are hashed; a
start with an unchanged model only calls `stat`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from streamchat.base import paths
from streamchat.base.atomic_files import read_json, save_result
from streamchat.base.errors import ModelNotFoundError, reason_of, short
from streamchat.base.progress import Progress, silent

BLOCK = 1 << 24
"""Bytes per block. The digest of a file is the digest of its block digests, so that threads can share the work."""
THREADS = 4
LARGE = 1 << 30
"""Minimum size in bytes for progress in numbers; smaller files take about a second."""
SETTLED_NS = 2_000_000_000
"""Minimum age of a file for its digest to be cached: a newer file could change again within one clock tick."""


def folder_digest(folder: Path, files: Iterable[Path], *, name: str, progress: Progress = silent) -> str:
    """Return one digest of `files`: their names relative to `folder`, and every byte.

    Args:
        folder: Folder of the files.
        files: Files in any order; links are followed.
        name: Name of the model, for progress.
        progress: Called with bytes; may raise to cancel.

    Raises:
        ModelNotFoundError: A file cannot be read.
    """
    parts = {file.relative_to(folder).as_posix(): file_digest(file, name=name, progress=progress) for file in files}
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()


def file_digest(file: Path, *, name: str, progress: Progress = silent) -> str:
    """Return the digest of every byte of `file`. Arguments and errors are those of `folder_digest`."""
    with _readable(file):
        path = file.resolve(strict=True)
        before = _state(path)
    record = paths.cache_path("digests", os.fsencode(path), ".json")
    known = read_json(record)
    if known.get("state") == before and isinstance(known.get("digest"), str):
        return str(known["digest"])
    digest = _hash(path, before[2], f"Checking {name} (once)", progress)
    with _readable(file):
        is_same = _state(path) == before
    if is_same and time.time_ns() - max(before[3:]) > SETTLED_NS:
        save_result(record, {"state": before, "digest": digest}, f"the digest of {path}")
    return digest


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn an OSError in this block into an error message about `file`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that points to itself
        what = f"{file} cannot be read: {short(reason_of(error))}"
        raise ModelNotFoundError(f"{what}; fetch it again or make it readable") from error


def _state(file: Path) -> list[int]:
    """Return device, inode, size, mtime and ctime, which change when a file is modified or replaced.

    ctime is included because mtime can be reset.
    """
    about = file.stat()
    return [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]


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
