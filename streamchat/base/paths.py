"""Folders of streamchat's files, by the platform's conventions (platformdirs).

`STREAMCHAT_HOME` puts configuration, data, cache and state into one folder, for tests and portable use.
"""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import PlatformDirs

_DIRS = PlatformDirs("streamchat", appauthor=False)


def user_path(text: str | Path) -> Path:
    """Return `text` as a path with `~` expanded; `~name` of an unknown user is left unexpanded."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
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


def data_dir() -> Path:
    """Return the folder of saved sessions. It may not exist yet."""
    return _root("data", _DIRS.user_data_dir)


def state_dir() -> Path:
    """Return the folder of input history and logs. It may not exist yet."""
    return _root("state", _DIRS.user_state_dir)


def private_opener(path: str, flags: int) -> int:
    """Opener for `open`: a new file is readable only by the user."""
    return os.open(path, flags, 0o600)


def write_private(path: Path, text: str) -> None:
    """Write a UTF-8 file readable only by the user; characters that cannot be encoded are replaced."""
    with open(path, "w", encoding="utf-8", errors="replace", opener=private_opener) as file:
        file.write(text)


def private_dir(path: Path) -> Path:
    """Create the folder `path`, readable only by the user, and return it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
