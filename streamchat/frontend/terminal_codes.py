"""Terminal control sequences for the window title, notifications and links. Pure functions; front ends write them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from streamchat.base.sanitize import one_line

Notifier = Literal["osc9", "osc777", "bell"]
BELL = "\a"
SAVE_TITLE = "\x1b[22;2t"
RESTORE_TITLE = "\x1b]2;\x1b\\\x1b[23;2t"
"""Empties the title first, for terminals that cannot restore it."""
MAX_TEXT = 120
MAX_ADDRESS = 2000
"""Longer addresses are not links; terminals limit them, too."""
_END = "\x1b\\"
_PROGRAMS: dict[str, Notifier] = {"iTerm.app": "osc9", "WezTerm": "osc777", "WarpTerminal": "osc9", "ghostty": "osc777"}
"""`TERM_PROGRAM` -> how it is told to notify the user."""
_TERMINALS: tuple[tuple[str, Notifier], ...] = (
    ("xterm-kitty", "osc9"),
    ("xterm-ghostty", "osc777"),
    ("foot", "osc777"),
    ("rxvt-unicode", "osc777"),
)
"""Start of `TERM` -> the same."""
_WITHOUT_OSC = ("", "dumb", "unknown", "linux", "cons25", "eterm", "eterm-color", "sun")
_ADDRESS = re.compile(r"https?://[!-~]+", re.ASCII)
_UNFINISHED = re.compile(r"(?<![A-Za-z0-9])(?:h|ht|htt|https?|https?:|https?:/|https?://[!-~]*)\Z", re.ASCII)
_NOT_IN_ADDRESS = re.compile(r"[<>\"`{}|\\^]")
_PUNCTUATION = ".,;:!?'*_~"


def supports_osc(environ: Mapping[str, str]) -> bool:
    """Return whether the terminal ignores operating system commands that it does not know, instead of showing them."""
    term = environ.get("TERM", "")
    return term not in _WITHOUT_OSC and not term.startswith("vt")


# --- title and notifications --------------------------------------------------------------------------------------


def title_code(text: str) -> str:
    """Return the sequence that sets the title of the window."""
    return f"\x1b]2;{_field(text)}{_END}"


def notifier_of(environ: Mapping[str, str]) -> Notifier:
    """Return how the terminal can be told to notify the user: by a sequence that it is known to have, else the bell.

    tmux and screen forward the bell only.
    """
    term = environ.get("TERM", "")
    if environ.get("TMUX") or term.startswith(("tmux", "screen")):
        return "bell"
    if (known := _PROGRAMS.get(environ.get("TERM_PROGRAM", ""))) is not None:
        return known
    return next((how for start, how in _TERMINALS if term.startswith(start)), "bell")


def notification_code(how: Notifier, title: str, text: str) -> str:
    """Return the sequence that notifies the user."""
    match how:
        case "osc9":
            return f"\x1b]9;{_field(f'{title}: {text}')}{_END}"
        case "osc777":
            return f"\x1b]777;notify;{_field(title)};{_field(text)}{_END}"
        case "bell":
            return BELL


def _field(text: str) -> str:
    """Return `text` without control characters and separators of fields."""
    return one_line(text[: 4 * MAX_TEXT]).replace(";", ",")[:MAX_TEXT]


# --- links ----------------------------------------------------------------------------------------------------------


def find_addresses(text: str) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of each web address in `text`, without punctuation after it.

    Only addresses of ASCII characters are found: others would not be what they look like.
    """
    for match in _ADDRESS.finditer(text):
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        address = _NOT_IN_ADDRESS.split(match[0], maxsplit=1)[0]
        if len(address) == len(match[0]) and after > "\x7f" and after.isalnum():
            continue
        address = _trimmed(address)
        has_host = len(address) > len(address.split("://")[0]) + 3
        if has_host and len(address) <= MAX_ADDRESS and not (before.isascii() and before.isalnum()):
            yield match.start(), match.start() + len(address)


def _trimmed(address: str) -> str:
    """Return an address without the punctuation and closing brackets of the sentence around it."""
    counts, end = {bracket: address.count(bracket) for bracket in "()[]"}, len(address)
    while end:
        last = address[end - 1]
        opening = {")": "(", "]": "["}.get(last)
        if last not in _PUNCTUATION and (opening is None or counts[last] <= counts[opening]):
            break
        if last in counts:
            counts[last] -= 1
        end -= 1
    return address[:end]


def linked(text: str) -> str:
    """Return `text` with every web address as a link (OSC 8) whose target is the address that is shown."""
    parts, at = [], 0
    for start, end in find_addresses(text):
        address = text[start:end]
        parts += [text[at:start], f"\x1b]8;;{address}{_END}{address}\x1b]8;;{_END}"]
        at = end
    return "".join([*parts, text[at:]])


class LinkStream:
    """`linked` for text that arrives in pieces: an address is held back until its end is known."""

    def __init__(self) -> None:
        self._pending = ""

    def feed(self, piece: str) -> str:
        """Add text and return what can be shown."""
        text = self._pending + piece
        match = _UNFINISHED.search(text)
        if match is None or len(text) - match.start() > MAX_ADDRESS:
            self._pending = ""
            return linked(text)
        self._pending = text[match.start() :]
        return linked(text[: match.start()])

    def end(self) -> str:
        """End the text and return what was held back."""
        pending, self._pending = self._pending, ""
        return linked(pending)
