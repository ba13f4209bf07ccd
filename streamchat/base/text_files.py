"""Reads the text files that users name, with one policy for encodings.

A byte order mark (UTF-8, UTF-16 or UTF-32) decides the encoding; a file without one is UTF-8. If the bytes are neither,
a command that prints notes may guess: UTF-8 with damaged bytes, which become U+FFFD, if more characters than bytes are
intact; else Windows-1252. Everywhere else the file is refused. A NUL byte means that a file is not text.
"""

from __future__ import annotations

import codecs
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.formatting import human_bytes, plural
from streamchat.base.paths import user_path
from streamchat.base.sanitize import one_line

STDIN = "-"
"""Name of standard input, for commands that accept it as a file."""
# longest first, because the byte order mark of UTF-32 starts with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
FALLBACK = "windows-1252"
START_BYTES = 2**20
"""Bytes of a stream that are checked before the rest is read; a multiple of the size of a character."""


@dataclass(frozen=True)
class DecodedText:
    """A text with line ends normalized to LF, and how its bytes were read."""

    text: str
    notes: tuple[str, ...] = ()
    """Notes about the encoding and the line ends, as predicates: "is UTF-16"."""
    guess: str = ""
    """The note about bytes that are not valid in the encoding; '' if there are none."""


def read_text(
    path: str | Path, *, max_bytes: int | None = None, regular: bool = False, guess: bool = False
) -> DecodedText:
    """Read a text file.

    Args:
        path: The file; `~` is expanded.
        max_bytes: Maximum size; None for no limit.
        regular: Refuse devices and pipes, which may never end.
        guess: Guess the encoding instead of refusing the file.

    Raises:
        ConfigError: The file cannot be read, is too large or is not text; the message starts with its name.
    """
    shown, path = one_line(str(path)), user_path(path)
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise ConfigError(f"{shown} is a folder; choose a file in it")
        if regular and not stat.S_ISREG(kind):
            raise ConfigError(f"{shown} is not a regular file")
        with open(path, "rb") as file:
            start = b"" if stat.S_ISREG(kind) else _text_start(file, shown)
            content = start + file.read(-1 if max_bytes is None else max(0, max_bytes + 1 - len(start)))
        if max_bytes is not None and len(content) > max_bytes:
            size = human_bytes(max(len(content), path.stat().st_size))
            raise ConfigError(f"{shown} is too large ({size}; the limit is {human_bytes(max_bytes)}); use a part of it")
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown} cannot be read ({reason_of(error)})") from None
    return decode_text(content, shown, guess=guess)


def read_stdin(*, guess: bool = False) -> DecodedText:
    """Read standard input to its end; see `read_text`."""
    name = "standard input"
    return decode_text(_text_start(sys.stdin.buffer, name) + sys.stdin.buffer.read(), name, guess=guess)


def _text_start(file: BinaryIO, name: str) -> bytes:
    """Read the start of a stream, which may have no end: a device such as /dev/zero is refused before memory is full.

    Raises:
        ConfigError: It is not text.
    """
    start = file.read(START_BYTES)
    if 0 in start:
        decode_text(start, name)
    return start


def decode_text(content: bytes, name: str, *, guess: bool = False) -> DecodedText:
    """Decode the bytes of a text file called `name`; see `read_text`.

    Raises:
        ConfigError: The bytes are not text, or damaged.
    """
    encoding = next((known for mark, known in _MARKS if content.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and (at := content.find(0)) >= 0:
        raise ConfigError(f"{name} is not a text file (byte {at} is NUL)")
    note = guessed = ""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if not encoding.startswith("utf-8"):
            raise ConfigError(f"{name} starts as {encoding.upper()} and is damaged at byte {error.start}") from None
        if not guess:
            raise ConfigError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        text, how = _guess(content.removeprefix(codecs.BOM_UTF8))
        guessed = f"is not UTF-8 (byte {error.start}); {how}"
    else:
        if encoding != "utf-8":
            mark = encoding == "utf-8-sig"
            note = "starts with a byte order mark, which was removed" if mark else f"is {encoding.upper()}"
    lines = "has carriage returns; its line ends were normalized" if "\r" in text else ""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return DecodedText(text, tuple(filter(None, (note, guessed, lines))), guessed)


def _guess(content: bytes) -> tuple[str, str]:
    """Decode bytes that are not valid UTF-8; return the text and how it was decoded."""
    text = content.decode("utf-8", "replace")
    lost = text.count("\ufffd")
    if len(text) - len(text.encode("ascii", "ignore")) - lost > lost:
        return text, f"{plural(lost, 'damaged byte')} became U+FFFD"
    text = content.decode(FALLBACK, "replace")
    lost = text.count("\ufffd")
    unknown = f", with {plural(lost, 'undefined byte')} replaced by U+FFFD" if lost else ""
    return text, f"it was decoded as Windows-1252{unknown}"
