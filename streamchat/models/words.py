"""Small helpers for the sentences of this package, and the type of its progress callback."""

from __future__ import annotations

import re
from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with (stage in words, done, total or 0 when unknown, unit: "bytes" or ""). It may raise to cancel."""


def silent(_stage: str, _done: int, _total: int, _unit: str) -> None:
    """A `Progress` that shows nothing."""


def short(error: object, limit: int = 160) -> str:
    """The text of a foreign error as part of one sentence: one line, no final stop, cut at `limit` characters."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return (text if len(text) <= limit else text[: limit - 1].rstrip() + "…").rstrip(".")
