"""Moments of a start, written down for whoever measures it (`streamchat bench --startup`)."""

from __future__ import annotations

import os
import time
from contextlib import suppress

VARIABLE = "STREAMCHAT_TRACE"
"""Names the file; without it nothing is written."""
FAILED = "failed: "
"""What the name of a moment begins with at which the start was over; the reason follows."""


def wanted() -> bool:
    """Whether somebody measures this start."""
    return bool(os.environ.get(VARIABLE))


def mark(name: str) -> None:
    """Append `name` and the time of a clock that all processes of this machine share."""
    if path := os.environ.get(VARIABLE):
        with suppress(OSError), open(path, "a", encoding="utf-8") as stream:
            stream.write(f"{time.monotonic()} {name}\n")


def marks(path: str) -> dict[str, float]:
    """What has been written so far: the first time of each name."""
    found: dict[str, float] = {}
    with suppress(OSError), open(path, encoding="utf-8") as stream:
        for line in stream:
            moment, _, name = line.rstrip("\n").partition(" ")
            if line.endswith("\n"):
                found.setdefault(name, float(moment))
    return found
