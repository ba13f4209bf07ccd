"""Whether the user may name files of this machine. In a browser (`--serve`), `--serve-files` has to allow it."""

from __future__ import annotations

from streamchat.base.errors import ConfigError

_refusal = ""


def refuse(reason: str) -> None:
    """Refuse all commands that read, write or list files, with `reason`; '' allows them again."""
    global _refusal
    _refusal = reason


def allowed() -> bool:
    """Whether files may be named."""
    return not _refusal


def reason() -> str:
    """Why files must not be named; '' if they may."""
    return _refusal


def require(what: str) -> None:
    """Raise ConfigError if `what` (`/export`, `@file`) must not use files."""
    if _refusal:
        raise ConfigError(f"{what} is off {_refusal}")
