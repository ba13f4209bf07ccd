"""The theme that the user chose, and user themes.

A user theme is a file `themes/NAME.toml` in the configuration folder, with the fields of `textual.theme.Theme`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from textual.app import App
from textual.color import Color, ColorParseError
from textual.theme import Theme

from streamchat.base import paths
from streamchat.base.atomic_files import write_text
from streamchat.base.errors import ConfigError
from streamchat.base.text_files import read_text
from streamchat.config.loader import Configuration

_COLORS = [
    "primary",
    "secondary",
    "warning",
    "error",
    "success",
    "accent",
    "foreground",
    "background",
    "surface",
    "panel",
    "boost",
]
_PLAIN = {"dark": bool, "luminosity_spread": float, "text_alpha": float, "variables": dict}


def user_themes(folder: Path | None = None) -> tuple[list[Theme], list[str]]:
    """Load all user themes; returns (themes, a sentence per invalid file). The file name is the theme name."""
    folder = folder or paths.config_dir() / "themes"
    themes, problems = [], []
    for file in sorted(folder.glob("*.toml")) if folder.is_dir() else []:
        try:
            themes.append(_theme(file))
        except ValueError as error:
            problems.append(f"{file}: not a valid theme: {error}")
        except ConfigError as error:
            problems.append(str(error))
    return themes, problems


def remembered_theme() -> str:
    """The theme last chosen in the app; '' for none."""
    try:
        return _theme_file().read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def remember_theme(name: str) -> bool:
    """Save the choice for the next start; returns whether that succeeded."""
    try:
        write_text(_theme_file(), name + "\n", durable=False)
    except OSError:
        return False
    return True


def use_theme(app: App[Any], name: str, configuration: Configuration) -> str:
    """Switch to an existing theme; returns a note about the next start."""
    app.theme = name
    if configuration.is_explicit("theme"):
        return f"for this session only; the next start uses the theme from {configuration.origin('theme')}"
    return "also for the next start" if remember_theme(name) else "for this session only: the choice could not be saved"


def unknown_theme(name: str, known: Iterable[str]) -> str:
    """Message for an unknown theme, with similar names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names) or names[:4]
    return f"theme {name!r} does not exist; try {', '.join(close)} (/theme lists all themes)"


def _theme_file() -> Path:
    return paths.state_dir() / "theme"


def _theme(file: Path) -> Theme:
    given: dict[str, Any] = tomllib.loads(read_text(file).text)
    known = {field.name for field in fields(Theme)} - {"name"}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"unknown field {name}; choose from {', '.join([*_COLORS, *_PLAIN])}")
        if name in _COLORS:
            _check_color(name, value)
        elif name in _PLAIN and not isinstance(value, _PLAIN[name]):
            raise ValueError(f"{name} must be {_PLAIN[name].__name__}")
    if "primary" not in given:
        raise ValueError('primary is missing; add it, for example primary = "#0178D4"')
    return Theme(name=file.stem, **given)


def _check_color(name: str, value: Any) -> None:
    try:
        Color.parse(value)
    except (ColorParseError, TypeError, AttributeError):
        raise ValueError(f"{name} = {value!r} is not a color; use #RRGGBB") from None
