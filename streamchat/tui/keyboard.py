"""Keyboard input with safe pastes and suspension, also for invalid UTF-8.

Textual parses an escape inside a paste as the start of a key, and the rest as keys: an Enter would send half of the
paste. Most terminals remove escapes from pasted text, but tmux does not.
"""

from __future__ import annotations

import codecs
import errno
import os
import selectors
import signal

from textual.drivers.linux_driver import LinuxDriver
from textual.events import Key, Paste
from textual.message import Message

from streamchat.frontend.suspend import stop_process
from streamchat.frontend.window_title import WindowTitle
from streamchat.tui.key_parser import KeyParser

BLOCK_BYTES = 4096
WAIT_S = 0.1
"""Seconds to wait for a key before checking whether the app has ended."""
ESCAPE, BEGIN, END = "\x1b", "\x1b[200~", "\x1b[201~"


class PasteGuard:
    """Removes escapes from pasted text; input may arrive in chunks."""

    def __init__(self) -> None:
        self._inside = False
        self._recent = ""
        """The last characters outside a paste."""
        self._pending = ""
        """Inside a paste: a possible prefix of the end mark."""

    def feed(self, text: str) -> str:
        """Filter the next chunk of input. Text outside a paste is returned unchanged and at once."""
        return "".join(self._inner(letter) if self._inside else self._outer(letter) for letter in text)

    def _outer(self, letter: str) -> str:
        self._recent = (self._recent + letter)[-len(BEGIN) :]
        self._inside = self._recent == BEGIN
        return letter

    def _inner(self, letter: str) -> str:
        pending, self._pending = self._pending, ""
        if END.startswith(pending + letter):
            self._pending = pending + letter
            if self._pending != END:
                return ""
            self._inside, self._pending, self._recent = False, "", ""
            return END
        if letter == ESCAPE:
            self._pending, letter = letter, ""
        return pending.removeprefix(ESCAPE) + letter


class KeyboardDriver(LinuxDriver):
    """Linux and macOS driver with a `PasteGuard` before the parser, and a full redraw after suspension.

    It sets the window title while the app has the terminal.

    Textual's signal handlers write to the terminal at any point of the loop, and redraw only what changed.
    """

    _stopping = False
    _early: tuple[Message, ...] = ()
    """Keys and pastes that came before the app could take them."""

    def _sigtstp_application(self, *_: object) -> None:
        """SIGTSTP: suspend between two steps of the loop, with the terminal restored."""
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
        """SIGCONT: after SIGSTOP, which cannot be handled, set up the terminal again."""
        if self._auto_restart and not self._stopping:
            self._loop.call_soon_threadsafe(self._restart)

    def _restart(self) -> None:
        if self._writer_thread is not None and not self._stopping:
            self.suspend_application_mode()
            self.resume_application_mode()

    def resume_application_mode(self) -> None:
        """Set up the terminal and redraw the whole screen."""
        super().resume_application_mode()
        self._loop.call_soon_threadsafe(lambda: self._app.refresh(layout=True))

    def start_application_mode(self) -> None:
        """Take over the terminal and its title."""
        super().start_application_mode()  # type: ignore[no-untyped-call]
        if isinstance(title := getattr(self._app, "window_title", None), WindowTitle):
            self.write_code(title.begin())

    def stop_application_mode(self) -> None:
        """Restore the terminal and its title."""
        if isinstance(title := getattr(self._app, "window_title", None), WindowTitle):
            self.write_code(title.end())
        super().stop_application_mode()

    def write_code(self, code: str) -> None:
        """Write a control sequence, if the app has the terminal."""
        if code and self._writer_thread is not None:
            self.write(code)

    def process_message(self, message: Message) -> None:
        """Pass a message to the app. Keys and pastes wait until it has painted: before that, nothing takes them."""
        if isinstance(message, Key | Paste) and not self._app_takes_input():
            self._early = (*self._early, message)
        else:
            super().process_message(message)

    def _app_takes_input(self) -> bool:
        ready = getattr(self._app, "takes_input", None)
        return ready is None or ready.is_set()

    def _pass_early(self) -> None:
        """Pass on what was typed while the app started."""
        if self._early and self._app_takes_input():
            early, self._early = self._early, ()
            for message in early:
                super().process_message(message)

    def _read(self) -> bytes:
        """Return what was typed; nothing if the terminal was closed."""
        try:
            return os.read(self.fileno, BLOCK_BYTES)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""

    def _hang_up(self) -> None:
        """Raise SIGHUP: the kernel sends it only if the closed terminal controls this process."""
        os.kill(os.getpid(), signal.SIGHUP)

    def run_input_thread(self) -> None:
        """Read, filter, parse and dispatch input until the app ends."""
        parser, guard = KeyParser(self._debug), PasteGuard()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                self._pass_early()
                if selector.select(WAIT_S):
                    data = self._read()
                    if not data:
                        self._hang_up()
                        self.exit_event.wait()
                    elif text := guard.feed(decoder.decode(data)):
                        for event in parser.feed(text):
                            self.process_message(event)
                for event in parser.tick():
                    self.process_message(event)
            if selector.select(WAIT_S):
                self._read()  # discard late terminal responses, so that the shell does not read them
        for _ in parser.end():
            pass
