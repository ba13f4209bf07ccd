"""Turns what the terminal sends into events; a sequence that cannot be read is dropped, and input goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from textual._xterm_parser import XTermParser
from textual.events import Resize
from textual.message import Message

MAX_CELLS = 10_000
"""Maximum width and height of a terminal. One that reports more, or none, is not believed."""


class KeyParser:
    """Textual's parser, started anew when a sequence makes it fail.

    Textual expects the sequences that it asked the terminal for. Others arrive as well: a program that was killed may
    have left the terminal in another mode, such as kitty's reports of released keys.

    Args:
        debug: Whether Textual logs keys.
    """

    def __init__(self, debug: bool = False) -> None:
        self._debug = debug
        self._parser = XTermParser(debug)

    def feed(self, text: str) -> Iterator[Message]:
        """Yield the events of the next text."""
        for letter in text:  # so that a failure costs one sequence, and not what follows it
            yield from self._events(self._parser.feed(letter))

    def tick(self) -> Iterator[Message]:
        """Yield the events that are certain because nothing followed in time, such as a single escape."""
        return self._events(self._parser.tick())

    def end(self) -> Iterator[Message]:
        """Yield the events that were held back, at the end of the input."""
        return self._events(self._parser.feed(""))

    def _events(self, parsed: Iterable[Message]) -> Iterator[Message]:
        try:
            for event in parsed:
                if not isinstance(event, Resize) or _is_possible(event):
                    yield event
        except Exception:  # it fails in many ways, and cannot be used afterwards
            self._start_anew()

    def _start_anew(self) -> None:
        failed, self._parser = self._parser, XTermParser(self._debug)
        if failed.terminal_size is not None and min(failed.terminal_size) > 0:
            self._parser.mouse_pixels = failed.mouse_pixels
            self._parser.terminal_size = failed.terminal_size
            self._parser.terminal_pixel_size = failed.terminal_pixel_size


def _is_possible(event: Resize) -> bool:
    return all(0 < cells <= MAX_CELLS for cells in event.size)
