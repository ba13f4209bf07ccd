"""Notices on stderr, separate from the output of a command."""

from __future__ import annotations

import sys

from streamchat.base.sanitize import one_line


def say(text: str) -> None:
    """Print a line on stderr."""
    print(f"streamchat: {one_line(text)}", file=sys.stderr, flush=True)
