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
    """The driver of Linux and macOS with a `PasteGuard` before its parser."""

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
