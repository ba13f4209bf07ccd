"""A progress bar on stderr for long commands; occasional lines if stderr is not a terminal."""

from __future__ import annotations

import time
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from streamchat.base.sanitize import one_line

LINE_INTERVAL_S = 30.0


class Bar:
    """Shows progress up to `total` units of work, with the remaining time.

    Args:
        stream: Where to draw.
        total: Units of work, which should take about the same time each.
    """

    def __init__(self, stream: TextIO, total: float) -> None:
        self._stream, self._total, self._done = stream, total, 0.0
        self._printed_at = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            transient=True,
            disable=not stream.isatty(),
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, what: str, units: float = 0.0) -> None:
        """Add `units` of finished work on `what`."""
        self._done += units
        if not self._progress.disable:
            self._progress.update(self._task, description=escape(one_line(what)), advance=units)
        elif time.monotonic() - self._printed_at > LINE_INTERVAL_S:
            self._printed_at = time.monotonic()
            share = f"{100 * self._done / self._total:.0f} %" if self._total else ""
            print(f"streamchat: {one_line(what)} {share}", file=self._stream, flush=True)
