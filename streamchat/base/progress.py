"""The callback that reports progress of fetching, converting and loading a model."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with (stage in words, done, total or 0 if unknown, unit: "bytes" or ""). It may raise to cancel."""


def silent(_stage: str, _done: int, _total: int, _unit: str) -> None:
    """A `Progress` that shows nothing."""
