"""Writing to the terminal beside a prompt, and how the terminal behaves while no prompt reads from it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from prompt_toolkit import print_formatted_text
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.styles import Style
from prompt_toolkit.utils import is_dumb_terminal

from streamchat.base.ascii_text import in_encoding
from streamchat.base.sanitize import printable
from streamchat.repl.render import Piece

Modes = list[Any]
"""As `termios.tcgetattr` has them."""
REPLY_LABEL, YOU_LABEL = "bot> ", "you> "
STYLE = Style.from_dict(
    {
        "you": "bold ansigreen",
        "model": "bold ansicyan",
        "eviction": "ansiyellow",
        "warning": "ansiyellow",
        "error": "ansired",
        "info": "dim",
        "thought": "dim italic",
        "stats": "dim",
        "answer": "",
    }
)


class Terminal:
    """Writes pieces to stdout: coloured where allowed (not on a dumb terminal, not with NO_COLOR)."""

    def __init__(self) -> None:
        self._dumb = is_dumb_terminal()
        self._labelled = False

    def show(self, piece: Piece) -> None:
        """Write one piece; lines are safe while a prompt is on the screen (it is drawn again below)."""
        if piece.kind == "thought":
            self.line(piece.text, "thought", end="")
        elif piece.kind == "said":
            self.line(YOU_LABEL, "you", end="")
            self.line(piece.text)
        elif piece.kind == "again":
            self.line(REPLY_LABEL, "model", end="")
            self.line(piece.text)
        elif piece.kind not in ("reply", "end"):
            self.line(piece.text, piece.kind)
        elif piece.text:
            if not self._labelled:
                self.line(REPLY_LABEL, "model", end="")
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        self._labelled = piece.kind == "reply" or (self._labelled and piece.kind != "end")

    def line(self, text: str, kind: str = "answer", end: str = "\n") -> None:
        """Write a line of its own."""
        # prompt-toolkit would write ? for each character that the console lacks
        text = in_encoding(printable(text), sys.stdout.encoding)
        if self._dumb:
            print(text, end=end, flush=True)
        else:
            print_formatted_text(FormattedText([(f"class:{kind}", text)]), style=STYLE, end=end)


@contextlib.contextmanager
def between_prompts(interrupt: int | None = None) -> Iterator[None]:
    """For the time when no prompt reads: what the user types is not echoed into the reply, and waits for the next one.

    A paste stays one paste, Ctrl+C stays a signal, and Enter stays Enter (not a newline).

    Args:
        interrupt: The control character that is a signal in the place of Ctrl+C.
    """
    before = terminal_modes()
    if before is None:
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    quiet = list(before)
    quiet[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    quiet[3] |= termios.NOFLSH  # or Ctrl+C would throw away what was typed before it
    if interrupt is not None:
        quiet[6] = list(before[6])
        quiet[6][termios.VINTR] = bytes([interrupt])
    _paste_marks(True)
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
        yield
    finally:
        _paste_marks(False)
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


@contextlib.contextmanager
def as_before(modes: Modes | None) -> Iterator[None]:
    """The terminal in the modes that it had before, for a moment; then as it is now. None does nothing."""
    if modes is None:
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    now = termios.tcgetattr(descriptor)
    _paste_marks(False)
    termios.tcsetattr(descriptor, termios.TCSANOW, modes)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, now)
        _paste_marks(True)


def terminal_modes() -> Modes | None:
    """The modes of the terminal on stdin; None on Windows, and when stdin is not a terminal."""
    try:
        import termios

        return termios.tcgetattr(sys.stdin.fileno())
    except (ImportError, OSError, ValueError):
        return None


def _paste_marks(on: bool) -> None:
    if not is_dumb_terminal():
        with contextlib.suppress(OSError):
            sys.stdout.write("\x1b[?2004h" if on else "\x1b[?2004l")
            sys.stdout.flush()


@contextlib.contextmanager
def on_signals(numbers: tuple[int, ...], action: Callable[[int], None]) -> Iterator[None]:
    """Call `action` with the number of each of these signals, in the main thread."""

    def handler(number: int, frame: FrameType | None) -> None:
        action(number)

    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTSTP",) if hasattr(signal, name))  # nor this one
ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP
