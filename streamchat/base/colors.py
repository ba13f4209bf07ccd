"""Whether to write colors, by the rules of no-color.org and force-color.org.

`NO_COLOR`, if it is not empty, forbids colors and wins over `FORCE_COLOR`. `FORCE_COLOR`, unless it is empty, 0 or
false, asks for colors also if the output is not a terminal. Otherwise a terminal that is not dumb gets colors.
"""

from __future__ import annotations

from collections.abc import Mapping


def is_color_forbidden(environ: Mapping[str, str]) -> bool:
    """Return whether the user wants no colors anywhere."""
    return bool(environ.get("NO_COLOR"))


def wants_color(environ: Mapping[str, str], *, is_terminal: bool) -> bool:
    """Return whether to write colors to an output."""
    if is_color_forbidden(environ):
        return False
    if environ.get("FORCE_COLOR", "").lower() not in ("", "0", "false"):
        return True
    return is_terminal and environ.get("TERM") != "dumb"
