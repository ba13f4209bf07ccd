"""Whether the user may access files on this machine. In a browser (`streamchat web`) this requires `--files`."""

from __future__ import annotations

from streamchat.base.errors import ConfigError

_refusal = ""


def refuse(reason: str) -> None:
    """Refuse all commands that read, write or list files, with `reason`; '' allows them again."""
    global _refusal
    _refusal = reason


def allowed() -> bool:
    """Whether file access is allowed."""
    return not _refusal


def reason() -> str:
    """Why file access is refused; '' if it is allowed."""
    return _refusal


def require(what: str) -> None:
    """Raise ConfigError if file access is refused. `what` names the feature: `/export`, `@file`."""
    if _refusal:
        raise ConfigError(f"{what} is off {_refusal}")
