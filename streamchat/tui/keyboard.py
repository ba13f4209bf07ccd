"""What comes from the keyboard. A paste stays a paste whatever is in it, and bytes that are no UTF-8 end nothing.

Textual takes an escape inside a paste for the beginning of a key, and what follows for keys: an Enter among them would
send half of the paste. Most terminals take escapes out of what is pasted; tmux, for one, does not.
"""

from __future__ import annotations

import codecs
import os
import selectors
from contextlib import suppress

from textual._parser import ParseError
from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver

from streamchat.frontend.suspend import stop_process

BLOCK_BYTES = 4096
WAIT_S = 0.1
"""How long to wait for a key before looking whether the app has ended."""
ESCAPE, BEGIN, END = "\x1b", "\x1b[200~", "\x1b[201~"


class PasteGuard:
    """Takes escapes out of pastes, in text that arrives in pieces."""

    def __init__(self) -> None:
        self._inside = False
        self._recent = ""
        """The last letters outside of a paste."""
        self._held = ""
        """Inside: an escape that may begin the end mark, and what has come of that."""

    def feed(self, text: str) -> str:
        """More of what was typed; returns what may go on. Outside of a paste that is all of it, at once."""
        return "".join(self._inner(letter) if self._inside else self._outer(letter) for letter in text)

    def _outer(self, letter: str) -> str:
        self._recent = (self._recent + letter)[-len(BEGIN) :]
        self._inside = self._recent == BEGIN
        return letter

    def _inner(self, letter: str) -> str:
        held, self._held = self._held, ""
        if END.startswith(held + letter):
            self._held = held + letter
            if self._held != END:
                return ""
            self._inside, self._held, self._recent = False, "", ""
            return END
        if letter == ESCAPE:
            self._held, letter = letter, ""
        return held.removeprefix(ESCAPE) + letter


class KeyboardDriver(LinuxDriver):
    """The driver of Linux and macOS with a `PasteGuard` before its parser, and a whole screen after a stop.

    Textual's own handlers write to the terminal in the middle of whatever the loop does, and draw only what changed.
    """

    _stopping = False

    def _sigtstp_application(self, *_: object) -> None:
        """Ctrl+Z of a shell, or `kill -TSTP`: stop between two steps of the loop, with the terminal as it was."""
        if self._auto_restart:
            self._loop.call_soon_threadsafe(self._stop)
        else:  # an editor has the terminal, and this process waits for it
            stop_process()

    def _stop(self) -> None:
        if self._writer_thread is None or self._stopping:
            return
        self._stopping = True
        self.suspend_application_mode()
        try:
            stop_process()
        finally:
            self.resume_application_mode()
            self._stopping = False

    def _sigcont_application(self, *_: object) -> None:
        """Continued. After `kill -STOP`, which cannot be noticed, the terminal is the shell's."""
        if self._auto_restart and not self._stopping:
            self._loop.call_soon_threadsafe(self._restart)

    def _restart(self) -> None:
        if self._writer_thread is not None and not self._stopping:
            self.suspend_application_mode()
            self.resume_application_mode()

    def resume_application_mode(self) -> None:
        """Take the terminal again, and draw all of the screen: it is blank."""
        super().resume_application_mode()
        self._loop.call_soon_threadsafe(lambda: self._app.refresh(layout=True))

    def run_input_thread(self) -> None:
        """Read, guard, parse, dispatch, until the app ends."""
        parser, guard = XTermParser(self._debug), PasteGuard()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                if selector.select(WAIT_S):
                    data = os.read(self.fileno, BLOCK_BYTES)
                    if not data:  # the terminal is gone; a signal says so
                        self.exit_event.wait(WAIT_S)
                    elif text := guard.feed(decoder.decode(data)):
                        for event in parser.feed(text):
                            self.process_message(event)
                for event in parser.tick():
                    self.process_message(event)
            if selector.select(WAIT_S):
                os.read(self.fileno, BLOCK_BYTES)  # late answers of the terminal are not for the shell
        with suppress(EOFError, ParseError):
            for _ in parser.feed(""):
                pass
