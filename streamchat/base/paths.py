"""Folders of streamchat's files, by the platform's conventions (platformdirs).

`STREAMCHAT_HOME` puts configuration, data, cache and state into one folder, for tests and portable use.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from platformdirs import PlatformDirs

_DIRS = PlatformDirs("streamchat", appauthor=False)


def user_path(text: str | Path) -> Path:
    """Return `text` as a path with `~` expanded; `~name` of an unknown or impossible user is left unexpanded."""
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # no such user; a name with a NUL or an undecodable letter
        return Path(text)


def _root(kind: str, default: str) -> Path:
    home = os.environ.get("STREAMCHAT_HOME")
    return user_path(home).absolute() / kind if home else Path(default)


def config_dir() -> Path:
    """Return the folder of the user's `config.toml`. It may not exist yet."""
    return _root("config", _DIRS.user_config_dir)


def cache_dir() -> Path:
    """Return the folder of fetched and converted models; safe to delete. It may not exist yet."""
    return _root("cache", _DIRS.user_cache_dir)


def cache_path(folder: str, key: str | bytes, ending: str) -> Path:
    """Return the path in `folder` of the cache for what `key` identifies: the start of its SHA-256, and `ending`."""
    digest = hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()
    return cache_dir() / folder / f"{digest[:32]}{ending}"


def data_dir() -> Path:
    """Return the folder of saved sessions. It may not exist yet."""
    return _root("data", _DIRS.user_data_dir)


def state_dir() -> Path:
    """Return the folder of input history and logs. It may not exist yet."""
    return _root("state", _DIRS.user_state_dir)


def private_opener(path: str, flags: int) -> int:
    """Opener for `open`: a new file is readable only by the user."""
    return os.open(path, flags, 0o600)


def private_dir(path: Path) -> Path:
    """Create the folder `path`, readable only by the user, and return it.

    The names of new folders are flushed to the disk: a file that is flushed is lost in a power failure if its folder
    is.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in reversed(missing):
        with suppress(OSError):  # the file system may not support it; writing the files reports a failing disk
            fsync(folder.parent)
    return path


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, if the system supports it."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
