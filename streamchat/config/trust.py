"""The list of `./config.toml` files that the user trusts, by path and contents: a changed file is not trusted.

It is stored in the user's state folder, readable only by the user.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from streamchat.base import paths
from streamchat.base.atomic_files import advice_on, read_json, write_json
from streamchat.base.errors import ConfigError, reason_of


def store_file() -> Path:
    """Return the file that lists the trusted files. It may not exist."""
    return paths.state_dir() / "trusted-config.json"


def is_trusted(path: Path, data: bytes) -> bool:
    """Return whether the user trusts the file `path` (absolute) with the contents `data`."""
    return _known().get(str(path)) == _digest(data)


def trust(path: Path, data: bytes) -> None:
    """Trust `path` as long as its contents are `data`; raises ConfigError if that cannot be saved."""
    _write({**_known(), str(path): _digest(data)})


def untrust(path: Path) -> bool:
    """Stop trusting `path`; return whether it was trusted. Raises ConfigError if that cannot be saved."""
    known = _known()
    if known.pop(str(path), None) is None:
        return False
    _write(known)
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _known() -> dict[str, str]:
    """Return path -> digest; empty if the list cannot be read, so that nothing is trusted."""
    return read_json(store_file())


def _write(known: dict[str, str]) -> None:
    file = store_file()
    try:
        write_json(file, known, durable=True, indent=1)  # the user's decisions on all files
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({reason_of(error)}); {advice_on(error.errno)}") from error
