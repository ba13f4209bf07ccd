"""Folders that are created atomically: built next to the target under a lock, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from streamchat.base import paths
from streamchat.base.atomic_files import ADVICE, advice_or, read_json
from streamchat.base.errors import ModelNotFoundError, reason_of, short
from streamchat.base.formatting import human_bytes
from streamchat.base.progress import Progress

MANIFEST = "streamchat.json"
POLL_S = 0.1
_BUILDING = ".building-"
DISK_ERRORS = {*ADVICE, errno.EACCES, errno.EPERM}


def models_dir() -> Path:
    """Return the folder of fetched and converted models. Does not create it."""
    return paths.cache_dir() / "models"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of `folder`, or None if the folder is incomplete.

    A folder is also incomplete if a file is missing or has another size; it is then built again.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def ensure(
    target: Path, build: Callable[[Path], Mapping[str, Any]], *, what: str, progress: Progress, need_bytes: int = 0
) -> Path:
    """Return `target`; build it first if it is not complete.

    Args:
        target: The finished folder.
        build: Fills the given folder and returns the contents of the manifest. If it raises, nothing is left behind.
            It may write temporary files next to the given folder; they are deleted.
        what: Name for messages.
        progress: Called while waiting for another process; may raise to cancel.
        need_bytes: Maximum disk space that building needs; `build` may also call `check_space` itself.

    Raises:
        ModelNotFoundError: The disk is full or the folder cannot be written.
    """
    if read_manifest(target) is not None:
        return target
    try:
        paths.private_dir(target.parent)
    except OSError as error:
        raise _disk_error(error, target.parent, what) from error
    try:
        with _exclusive(target, what, progress):
            if read_manifest(target) is not None:
                return target
            _remove_stale(target)
            check_space(target.parent, need_bytes, what)
            _build(target, build)
    except OSError as error:
        # other errors are not about this folder; for example, `progress` may have raised to cancel
        if error.errno not in DISK_ERRORS:
            raise
        raise _disk_error(error, target.parent, what) from error
    return target


def _build(target: Path, build: Callable[[Path], Mapping[str, Any]]) -> None:
    staging = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    try:
        model = staging / "model"
        model.mkdir()
        info = build(model)
        files = {str(path.relative_to(model)): path.stat().st_size for path in model.rglob("*") if path.is_file()}
        (model / MANIFEST).write_text(json.dumps({**info, "files": files}, indent=1), encoding="utf-8")
        for name in (*files, MANIFEST):
            # a rename can reach the disk before the contents: after a power failure the folder would look complete
            paths.fsync(model / name)
        if target.exists():
            shutil.rmtree(target)
        model.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f"{_BUILDING}{target.name}-"


def _remove_stale(target: Path) -> None:
    """Remove the unfinished folders of killed processes, for all targets: some may never be built again.

    The caller holds the lock of `target`. The lock of another target is free if no process is building it.
    """
    for path in target.parent.glob(f"{_BUILDING}*"):
        other = target.with_name(path.name.removeprefix(_BUILDING).rpartition("-")[0])
        if other == target:
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(filelock.Timeout), _lock(other).acquire(blocking=False):
                shutil.rmtree(path, ignore_errors=True)


def _lock(target: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(target.parent / f".{target.name}.lock")


@contextlib.contextmanager
def _exclusive(target: Path, what: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of `target`. While another process holds it, call `progress`, which may cancel."""
    lock = _lock(target)
    while True:
        try:
            lock.acquire(blocking=False)
            break
        except filelock.Timeout:
            progress(f"Waiting for another streamchat to prepare {what}", 0, 0, "")
            time.sleep(POLL_S)
    try:
        yield
    finally:
        lock.release()


def check_space(folder: Path, need_bytes: int, what: str, variable: str = "STREAMCHAT_HOME") -> None:
    """Check that the disk of `folder` has `need_bytes` free.

    Args:
        folder: An existing folder.
        need_bytes: Maximum disk space that is needed.
        what: Name for messages.
        variable: Environment variable that sets the folder, for the message.

    Raises:
        ModelNotFoundError: It has less.
    """
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise ModelNotFoundError(
            f"{what} needs up to {human_bytes(need_bytes)} of disk space in {folder} and {human_bytes(free)} are free; "
            f"make room, or set {variable} to a folder on another disk"
        )


def _disk_error(error: OSError, folder: Path, what: str) -> ModelNotFoundError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason, remedy = "the disk is full", "make room"
    else:
        reason, remedy = short(reason_of(error)), advice_or(error.errno, "make it writable")
    return ModelNotFoundError(
        f"{what} could not be stored in {folder} ({reason}); {remedy}, or set STREAMCHAT_HOME to another folder"
    )
