"""Startup trace events for `streamchat bench --startup`."""

from __future__ import annotations

import os
import time
from contextlib import suppress

VARIABLE = "STREAMCHAT_TRACE"
"""Environment variable with the trace file; if unset, nothing is written."""
FAILED = "failed: "
"""Prefix of the event that marks a failed start; the reason follows."""
PAINT = "first paint"
TORCH = "torch imported"
TRANSFORMERS = "transformers imported"
MODULES = "own modules imported"
TOKENIZER = "tokenizer read"
WEIGHTS = "weights read"
CHECKS = "weights prepared and checked"
READY = "model ready"
PREFILLED = "prompt prefilled"
TOKEN = "first token"


def is_enabled() -> bool:
    """Whether this start is traced."""
    return bool(os.environ.get(VARIABLE))


def mark(name: str) -> None:
    """Append an event with the time of a clock that all processes of this machine share."""
    if path := os.environ.get(VARIABLE):
        with suppress(OSError), open(path, "a", encoding="utf-8") as stream:
            stream.write(f"{time.monotonic()} {name}\n")


def read_events(path: str) -> dict[str, float]:
    """Return the events written so far: name -> time of its first occurrence, in seconds."""
    found: dict[str, float] = {}
    with suppress(OSError), open(path, encoding="utf-8") as stream:
        for line in stream:
            seconds, _, name = line.rstrip("\n").partition(" ")
            if line.endswith("\n"):
                found.setdefault(name, float(seconds))
    return found
