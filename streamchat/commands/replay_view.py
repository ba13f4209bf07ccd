"""Progress of a replay: a progress bar on a terminal, else one line per turn."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from streamchat.base import events as ev
from streamchat.base.formatting import human_bytes, plural
from streamchat.base.sanitize import one_line
from streamchat.frontend.progress import ProgressLine
from streamchat.replay.run import line_of

if TYPE_CHECKING:
    from streamchat.replay.run import Totals


class View:
    """Shows progress on `stream`. `print_message` and `loading` may be called on any thread.

    Args:
        stream: Where to print.
        total: Total turns; None if unknown.
        quiet: Print only violations and skipped lines.
        done: Turns that an earlier process completed.
    """

    def __init__(self, stream: TextIO, total: int | None, *, quiet: bool, done: int = 0) -> None:
        self._stream, self._quiet = stream, quiet
        self._loading = ProgressLine(stream)
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if stream.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("turn"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(file=stream),
            )
            self._task = self._bar.add_task("", total=total, completed=done, figures="", start=False)

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loading.clear()
        if self._bar is not None:
            self._bar.stop()

    def loading(self, event: ev.Event) -> None:
        """Show model loading; start the bar when the model is ready."""
        if isinstance(event, ev.ModelLoading):
            self._loading.show(event)
        elif isinstance(event, ev.ModelReady):
            self._loading.clear()
            if self._bar is not None and self._task is not None:
                self._bar.start_task(self._task)
                self._bar.start()
        elif isinstance(event, ev.Notice) and event.level != "info":
            self.print_message(event.text)

    def turn(self, row: dict[str, Any], totals: Totals) -> None:
        """Show a finished turn."""
        if self._bar is not None and self._task is not None:
            speed = f"{row['decode_tps']:.1f} tok/s · " if row["decode_tps"] else ""
            figures = (
                f"{speed}cache {row['cache_len']:,}/{row['cache_size']:,} · "
                f"{plural(totals.compressions, 'compression')} · {human_bytes(row['rss_bytes'])}"
            )
            self._bar.update(self._task, advance=1, figures=figures)
        elif not self._quiet:
            self._write(line_of(row, totals))

    def print_message(self, text: str) -> None:
        """Print a sentence above the bar."""
        self._write(f"streamchat: {one_line(text)}")

    def _write(self, line: str) -> None:
        with self._lock:
            self._loading.clear()
            if self._bar is not None and self._bar.live.is_started:
                self._bar.console.print(Text(line))
            else:
                print(line, file=self._stream, flush=True)
