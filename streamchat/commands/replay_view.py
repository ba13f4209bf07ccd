"""Progress of a replay: a progress bar on a terminal, else one line per turn."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from streamchat.base import events as ev
from streamchat.base.formatting import plural
from streamchat.base.sanitize import one_line
from streamchat.frontend.messages import figures_line
from streamchat.frontend.presenter import present
from streamchat.frontend.progress import ProgressLine
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import cache_short, short_forms

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
        self._bar = Progress(
            TextColumn("turn"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=stream),
            disable=quiet or not stream.isatty(),
        )
        self._task = self._bar.add_task("", total=total, completed=done, figures="", start=False)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *_: object) -> None:
        self._loading.clear()
        self._bar.stop()

    def start(self) -> None:
        """Start the bar at once, because the models are loaded elsewhere."""
        self._bar.start_task(self._task)
        self._bar.start()

    def loading(self, event: ev.Event) -> None:
        """Show model loading; start the bar when the model is ready."""
        if isinstance(event, ev.ModelLoading):
            self._loading.show(event)
        elif isinstance(event, ev.ModelReady):
            self._loading.clear()
            self.start()
        elif isinstance(event, ev.Notice) and (line := present(event)) is not None and line.kind != "info":
            self.print_message(line.text)

    def turn(self, row: dict[str, Any], totals: Totals, *, is_known: bool = False) -> None:
        """Show a finished turn; one that is known from an earlier process only advances the bar."""
        if not self._bar.disable:
            self._bar.update(self._task, advance=1, figures=" · ".join(short_forms(_board(row, totals))))
        elif not self._quiet and not is_known:
            self._write(log_line(row, totals))

    def print_message(self, text: str) -> None:
        """Print a sentence above the bar."""
        self._write(f"streamchat: {one_line(text)}")

    def print_skipped(self, problems: list[str]) -> None:
        """Print the first lines of the scripts that cannot be used."""
        for problem in problems[:10]:
            self.print_message(f"skipped: {problem}")
        if len(problems) > 10:
            self.print_message(f"skipped: {plural(len(problems) - 10, 'more line')}")

    def _write(self, line: str) -> None:
        with self._lock:
            self._loading.clear()
            if self._bar.live.is_started:
                self._bar.console.print(Text(line))
            else:
                print(line, file=self._stream, flush=True)


def log_line(row: dict[str, Any], totals: Totals) -> str:
    """Format a turn of a replay as a line of the log."""
    figures = figures_line(row["new_tokens"] or row["given_tokens"], row["decode_tps"], row["ttft_s"])
    cache = cache_short(row["cache_len"], row["cache_size"])
    prompt, compressions = plural(row["prompt_tokens"], "prompt token"), plural(totals.compressions, "compression")
    return f"turn {totals.turns:,}: {prompt} · {figures} · {cache} · {compressions}"


def _board(row: dict[str, Any], totals: Totals) -> StatusBoard:
    """The figures after a turn; compressions are those of the whole run."""
    cache = ev.CacheState(row["cache_len"], row["cache_size"], compressions=totals.compressions)
    memory = ev.MemoryState(row["rss_bytes"], allocated_bytes=row["vram_bytes"])
    return StatusBoard(cache=cache, memory=memory, decode_tps=row["decode_tps"])
