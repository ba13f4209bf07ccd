"""Where streamchat keeps its files. Everything follows the platform's conventions (platformdirs).

`STREAMCHAT_HOME` puts configuration, data, cache and state into one folder, for tests and portable use.
"""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import PlatformDirs

_DIRS = PlatformDirs("streamchat", appauthor=False)


def _root(kind: str, default: str) -> Path:
    home = os.environ.get("STREAMCHAT_HOME")
    return Path(home).expanduser() / kind if home else Path(default)


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


def private_dir(path: Path) -> Path:
    """Create `path` readable by the user only, and return it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
