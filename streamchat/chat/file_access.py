"""Whether who types may name files of this machine. In a browser (`--serve`) that has to be allowed first."""

from __future__ import annotations

from streamchat.errors import ConfigError

_refusal = ""


def refuse(reason: str) -> None:
    """No command reads, writes or lists a file from now on; `reason` is told who tries. '' allows it again."""
    global _refusal
    _refusal = reason


def allowed() -> bool:
    """Whether files may be named."""
    return not _refusal


def reason() -> str:
    """Why files must not be named; '' if they may."""
    return _refusal


def require(what: str) -> None:
    """Raise ConfigError where `what` (`/export`, `@file`) would use a file and must not."""
    if _refusal:
        raise ConfigError(f"{what} is off {_refusal}")
