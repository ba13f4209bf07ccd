"""Themes of the user: `themes/NAME.toml` in the configuration folder, with the fields of `textual.theme.Theme`."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from textual.color import Color, ColorParseError
from textual.theme import Theme

from streamchat.base import paths

_COLOURS = [
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
    """(themes, a sentence for each file that is none). A theme has the name of its file."""
    folder = folder or paths.config_dir() / "themes"
    themes, problems = [], []
    for file in sorted(folder.glob("*.toml")) if folder.is_dir() else []:
        try:
            themes.append(_theme(file))
        except ValueError as error:
            problems.append(f"{file}: no theme: {error}")
        except OSError as error:
            problems.append(f"{file}: cannot be read ({error.strerror or type(error).__name__})")
    return themes, problems


def remembered_theme() -> str:
    """The theme that was chosen in the app last; '' for none."""
    try:
        return _memory().read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def remember_theme(name: str) -> bool:
    """Keep the choice for the next start; returns whether that was possible."""
    try:
        paths.private_dir(paths.state_dir())
        paths.write_private(_memory(), name + "\n")
    except OSError:
        return False
    return True


def _memory() -> Path:
    return paths.state_dir() / "theme"


def _theme(file: Path) -> Theme:
    given: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    known = {field.name for field in fields(Theme)} - {"name"}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name} is not known; the fields are {', '.join([*_COLOURS, *_PLAIN])}")
        if name in _COLOURS:
            _check_colour(name, value)
        elif name in _PLAIN and not isinstance(value, _PLAIN[name]):
            raise ValueError(f"{name} must be {_PLAIN[name].__name__}")
    if "primary" not in given:
        raise ValueError('primary is missing, such as primary = "#0178D4"')
    return Theme(name=file.stem, **given)


def _check_colour(name: str, value: Any) -> None:
    try:
        Color.parse(value)
    except (ColorParseError, TypeError, AttributeError):
        raise ValueError(f"{name} = {value!r} is no colour; write it as #RRGGBB") from None
