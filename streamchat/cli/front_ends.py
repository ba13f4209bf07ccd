"""Which face talks to the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any, Literal

from streamchat.cli.serve import in_browser

Face = Literal["pipe", "prompt", "app"]


def choose_face(plain: bool, stdin: IO[Any] | None, stdout: IO[Any] | None, environ: Mapping[str, str]) -> Face:
    """The pipe where one end is no terminal, the prompt where asked for, else the app."""
    if in_browser(environ):
        return "app"  # in a browser; its ends are pipes
    if stdin is None or stdout is None or not (stdin.isatty() and stdout.isatty()):
        return "pipe"
    return "prompt" if plain or environ.get("TERM") in ("dumb", "unknown") else "app"
