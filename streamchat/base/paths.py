"""Where streamchat keeps its files. Everything follows the platform's conventions (platformdirs).

`STREAMCHAT_HOME` puts configuration, data, cache and state into one folder, for tests and portable use.
"""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import PlatformDirs

_DIRS = PlatformDirs("streamchat", appauthor=False)


def user_path(text: str | Path) -> Path:
    """`text` as a path; `~` is the home folder, and `~name` of nobody here stays as it is (and is not found)."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _root(kind: str, default: str) -> Path:
    home = os.environ.get("STREAMCHAT_HOME")
    return user_path(home).absolute() / kind if home else Path(default)


def config_dir() -> Path:
    """Folder of the user's `config.toml`. Not created here."""
    return _root("config", _DIRS.user_config_dir)


def cache_dir() -> Path:
    """Folder of fetched and converted models; safe to delete. Not created here."""
    return _root("cache", _DIRS.user_cache_dir)


def data_dir() -> Path:
    """Folder of saved conversations. Not created here."""
    return _root("data", _DIRS.user_data_dir)


def state_dir() -> Path:
    """Folder of prompt history and logs. Not created here."""
    return _root("state", _DIRS.user_state_dir)


def private_opener(path: str, flags: int) -> int:
    """For `open(..., opener=private_opener)`: a file that is new is readable by the user only."""
    return os.open(path, flags, 0o600)


def write_private(path: Path, text: str) -> None:
    """Write a file of the user's own as UTF-8; what cannot be encoded (undecodable file names) is replaced."""
    with open(path, "w", encoding="utf-8", errors="replace", opener=private_opener) as file:
        file.write(text)


def private_dir(path: Path) -> Path:
    """Create `path` readable by the user only, and return it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk, as far as the system can."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
