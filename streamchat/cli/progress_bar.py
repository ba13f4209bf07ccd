"""A progress bar on stderr for long commands; elsewhere than on a terminal, a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from streamchat.base.sanitize import one_line

LINE_EVERY_S = 30.0


class Bar:
    """Counts up to `total` units of work, with the time that is left.

    Args:
        stream: Where it is drawn.
        total: Of the work, in units that take about the same time.
    """

    def __init__(self, stream: TextIO, total: float) -> None:
        self._stream, self._total, self._done = stream, total, 0.0
        self._progress: Progress | None = None
        self._said = time.monotonic()
        if stream.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(file=stream),
                transient=True,
            )
            self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, what: str, units: float = 0.0) -> None:
        """`units` more are done, of `what`."""
        self._done += units
        if self._progress is not None:
            self._progress.update(self._task, description=escape(one_line(what)), advance=units)
        elif time.monotonic() - self._said > LINE_EVERY_S:
            self._said = time.monotonic()
            share = f"{100 * self._done / self._total:.0f} %" if self._total else ""
            print(f"streamchat: {one_line(what)} {share}", file=self._stream, flush=True)
