"""Terminal output around a prompt, and terminal modes while no prompt reads input."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from prompt_toolkit import print_formatted_text
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import is_dumb_terminal

from streamchat.base.ascii_text import in_encoding
from streamchat.base.sanitize import printable
from streamchat.frontend.presenter import Line
from streamchat.frontend.terminal_codes import LinkStream, supports_osc

Modes = list[Any]
"""As returned by `termios.tcgetattr`."""
REPLY_LABEL, YOU_LABEL = "bot> ", "you> "
STYLE = Style.from_dict(
    {
        "you": "bold ansigreen",
        "model": "bold ansicyan",
        "eviction": "ansiyellow",
        "warning": "ansiyellow",
        "error": "ansired",
        "info": "dim",
        "ready": "dim",
        "thought": "dim italic",
        "figures": "dim",
        "cut": "ansiyellow",
        "aside": "dim",
        "answer": "",
    }
)


class Terminal:
    """Writes pieces to stdout, colored unless the terminal is dumb or NO_COLOR is set."""

    def __init__(self) -> None:
        self._dumb = is_dumb_terminal()
        self._labelled = False
        self._links = LinkStream() if sys.stdout.isatty() and supports_osc(os.environ) else None

    def show(self, piece: Line) -> None:
        """Write one piece. Safe while a prompt is active: prompt-toolkit redraws it below."""
        if piece.kind == "thought":
            self.line(piece.text, "thought", end="")
        elif piece.kind == "past_message":
            self.line(YOU_LABEL, "you", end="")
            self.line(piece.text)
        elif piece.kind == "past_reply":
            self.line(REPLY_LABEL, "model", end="")
            self.line(piece.text)
        elif piece.kind not in ("reply", "end"):
            self.line(piece.text, piece.kind)
        elif text := self._with_links(piece):
            if not self._labelled:
                self.line(REPLY_LABEL, "model", end="")
            sys.stdout.write(text)
            sys.stdout.flush()
        self._labelled = piece.kind == "reply" or (self._labelled and piece.kind != "end")

    def _with_links(self, piece: Line) -> str:
        """Return a piece of a reply with web addresses as links; the end of one may be held back."""
        if self._links is None:
            return piece.text
        return self._links.feed(piece.text) if piece.kind == "reply" else self._links.end() + piece.text

    def code(self, code: str) -> None:
        """Write a control sequence that draws nothing."""
        if code and sys.stdout.isatty():
            sys.stdout.write(code)
            sys.stdout.flush()

    def line(self, text: str, kind: str = "answer", end: str = "\n") -> None:
        """Write a separate line."""
        # prompt-toolkit would write ? for each unencodable character
        text = in_encoding(printable(text), sys.stdout.encoding)
        if self._dumb:
            print(text, end=end, flush=True)
        else:
            print_formatted_text(FormattedText([(f"class:{kind}", text)]), style=STYLE, end=end)


@contextlib.contextmanager
def between_prompts(interrupt: int | None = None) -> Iterator[None]:
    """Buffer typed input without echo while no prompt is active; the next prompt reads it.

    A paste stays one paste, Ctrl+C stays a signal, and Enter stays a carriage return.

    Args:
        interrupt: Control character that raises SIGINT instead of Ctrl+C.
    """
    before = terminal_modes()
    if before is None:
        yield
        return
    import termios

    quiet = list(before)
    quiet[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    quiet[3] |= termios.NOFLSH  # otherwise Ctrl+C discards the input typed before it
    if interrupt is not None:
        quiet[6] = list(before[6])
        quiet[6][termios.VINTR] = bytes([interrupt])
    with _set_modes(quiet, paste_marks=True):
        yield


@contextlib.contextmanager
def as_before(modes: Modes | None) -> Iterator[None]:
    """Temporarily restore the given terminal modes; None does nothing."""
    with contextlib.nullcontext() if modes is None else _set_modes(modes, paste_marks=False):
        yield


@contextlib.contextmanager
def _set_modes(modes: Modes, *, paste_marks: bool) -> Iterator[None]:
    """Set terminal modes, and whether the terminal marks pastes; restore both at the end."""
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    _paste_marks(paste_marks)
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, modes)
        yield
    finally:
        _paste_marks(not paste_marks)
        with contextlib.suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


def terminal_modes() -> Modes | None:
    """Modes of the terminal on stdin; None on Windows, or if stdin is not a terminal or was closed."""
    try:
        import termios
    except ImportError:
        return None
    with contextlib.suppress(OSError, ValueError, termios.error):
        return termios.tcgetattr(sys.stdin.fileno())
    return None


def _paste_marks(on: bool) -> None:
    if not is_dumb_terminal():
        with contextlib.suppress(OSError):
            sys.stdout.write("\x1b[?2004h" if on else "\x1b[?2004l")
            sys.stdout.flush()


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTSTP",) if hasattr(signal, name))
"""Empty on Windows."""
ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
