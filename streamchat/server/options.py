"""How to serve. Needs none of the optional libraries."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from streamchat.base.errors import ConfigError
from streamchat.server.limits import Limits


@dataclass(frozen=True)
class Options:
    """How to serve."""

    host: str = "127.0.0.1"
    port: int = 8080
    live: int = 4
    names: tuple[str, ...] = ()
    """Host names that clients use, besides that of the machine."""
    token_file: Path | None = None
    """File of the token; given, it is needed on every address."""
    limits: Limits = field(default_factory=Limits)


def has_attach() -> bool:
    """Return whether front ends can be attached: their library is installed."""
    return find_spec("websockets") is not None


def require_libraries() -> None:
    """Check that the optional libraries are installed.

    Raises:
        ConfigError: One is missing.
    """
    for name in ("greenlet", "starlette", "uvicorn"):
        try:
            __import__(name)
        except ImportError:
            raise ConfigError(f"`streamchat serve` needs {name}; run: pip install 'streamchat[server]'") from None
