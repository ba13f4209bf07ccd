"""Select the front end: app, prompt or pipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any, Literal

from streamchat.web.launch import in_browser

FrontEnd = Literal["pipe", "prompt", "app"]


def choose_front_end(
    plain: bool, stdin: IO[Any] | None, stdout: IO[Any] | None, environ: Mapping[str, str]
) -> FrontEnd:
    """Return the pipe if stdin or stdout is not a terminal, the prompt if asked for, else the app."""
    if in_browser(environ):
        return "app"  # its stdin and stdout are pipes
    if stdin is None or stdout is None or not (stdin.isatty() and stdout.isatty()):
        return "pipe"
    return "prompt" if plain or environ.get("TERM") in ("dumb", "unknown") else "app"
