"""The progress line on stderr while a command loads a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from streamchat.base.events import ModelLoading
from streamchat.base.progress import Progress
from streamchat.frontend.progress import ProgressLine


@contextmanager
def loading_line() -> Iterator[Progress]:
    """Yield a function that shows progress; the line is cleared at the end, also after an error.

    Import torch inside the block: importing it is the first stage.
    """
    line = ProgressLine(sys.stderr)

    def progress(stage: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        line.show(ModelLoading(stage, done, total, "bytes" if unit == "bytes" else ""))

    try:
        progress("Starting torch")
        yield progress
    finally:
        line.clear()
