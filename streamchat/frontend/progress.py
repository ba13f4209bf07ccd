"""Loading progress on stderr: one live line on a terminal, a few plain lines otherwise."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

from streamchat.base import events as ev
from streamchat.frontend.messages import loading_text

QUARTERS = 4


class ProgressLine:
    """Shows `ModelLoading` events.

    Without a terminal, it keeps logs short: it shows only downloads (which may take minutes), at each quarter.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._live = stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._shown = ""
        self._last: tuple[str, int] | None = None

    def show(self, event: ev.ModelLoading) -> None:
        """Show the progress of loading."""
        if self._stream is None:
            return
        text = loading_text(event)
        if self._live:
            columns = max(10, shutil.get_terminal_size().columns - 1)
            self._write("\r" + text[:columns].ljust(min(len(self._shown), columns)))
            self._shown = text[:columns]
            return
        quarter = event.done * QUARTERS // event.total if event.total else 0
        if event.unit == "bytes" and self._last != (event.stage, quarter):
            self._last = (event.stage, quarter)
            self._write(f"streamchat: {text}\n")

    def clear(self) -> None:
        """Erase the line."""
        if self._shown:
            self._write("\r" + " " * len(self._shown) + "\r")
            self._shown = ""

    def _write(self, text: str) -> None:
        assert self._stream is not None
        self._stream.write(text)
        self._stream.flush()
