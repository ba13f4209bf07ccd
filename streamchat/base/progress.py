"""The callback that reports progress of fetching, converting and loading a model."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Reports a stage and how much of it is done."""

    def __call__(self, stage: str, done: int = 0, total: int = 0, unit: str = "", /) -> None:
        """Report the progress; may raise to cancel.

        Args:
            stage: What is done, in words.
            done: How much of `total`.
            total: 0 if unknown.
            unit: "bytes" or "".
        """
        ...


def silent(_stage: str, _done: int = 0, _total: int = 0, _unit: str = "") -> None:
    """A `Progress` that shows nothing."""
