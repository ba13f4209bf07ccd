"""Shows a reply while it is generated: in a notebook as rendered Markdown, elsewhere as text on stdout."""

from __future__ import annotations

import sys
import time
from typing import Any

from streamchat.base.sanitize import PrintableStream
from streamchat.scripting.reply import reply_markdown

INTERVAL_S = 0.1
"""Time between two updates of a notebook's output."""


class NotebookReply:
    """A reply in the output of a notebook's cell.

    Args:
        display: The function `IPython.display.display`.
        markdown: The class `IPython.display.Markdown`.
    """

    def __init__(self, display: Any, markdown: Any) -> None:
        self._markdown, self._text, self._updated = markdown, "", 0.0
        self._handle = display(markdown(""), display_id=True)

    def add(self, text: str) -> None:
        """Add text, and update the output if it is due."""
        self._text += text
        if time.monotonic() - self._updated >= INTERVAL_S:
            self._update()

    def end(self) -> None:
        """Show the whole text."""
        self._update()

    def _update(self) -> None:
        self._updated = time.monotonic()
        self._handle.update(self._markdown(reply_markdown(self._text)))


class PrintedReply:
    """A reply on stdout."""

    def __init__(self) -> None:
        self._stream = PrintableStream()

    def add(self, text: str) -> None:
        """Print text."""
        print(self._stream.feed(text), end="", flush=True)

    def end(self) -> None:
        """End the line."""
        print(self._stream.end(), flush=True)


def live_reply() -> NotebookReply | PrintedReply:
    """Return where to show a reply: the notebook's cell, or stdout."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return PrintedReply()
    from IPython.display import Markdown, display

    return NotebookReply(display, Markdown)
