"""Text that is safe on a terminal: it must not move the cursor, retitle the window, or show letters in another order.

Two functions, for everything that others wrote: `printable` for texts, `one_line` for names, titles and sentences.
"""

from __future__ import annotations

import re

# Whole escape sequences: CSI, then OSC / DCS / SOS / PM / APC strings, then the short ones. Strings are bounded, so
# that a lone introducer cannot swallow a reply.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]{0,256}(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]{1,8}[0-~]"
    r"|\x1b[0-OQ-WYZ\\`-~]"
)
# The beginning of one of them at the end of a piece of text.
_UNFINISHED = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}\Z"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]{0,256}\x1b?\Z"
    r"|\x1b[ -/]{0,8}\Z"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
# Embeddings, overrides and isolates show text in another order than it has, and their deprecated kin. The marks of
# direction (U+200E, U+200F, U+061C) and joiners stay in texts: scripts and emoji need them.
_REORDERING = re.compile("[\u202a-\u202e\u2066-\u206f\ufff9-\ufffb]")
# In a name, what cannot be seen makes two names look the same. A joiner stays between letters that are not ASCII, and
# the tags of a flag stay behind it.
_INVISIBLE = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]{2,8}\U000e007f)|(?<=[^\x00-\x7f])([\u200c\u200d])(?=[^\x00-\x7f])"
    "|[\u00ad\u034f\u061c\u180e\u200b-\u200f\u2060-\u2064\ufeff\U000e0000-\U000e007f]"
)
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without terminal control sequences, control characters and bidirectional controls; newline and tab stay.

    Lone surrogates (undecodable bytes) become U+FFFD, so that the result can always be encoded as UTF-8.
    """
    return encodable(_REORDERING.sub("", _CONTROLS.sub("", _SEQUENCE.sub("", text))))


def encodable(text: str) -> str:
    """`text` with U+FFFD in place of lone surrogates, which neither a tokenizer nor UTF-8 takes."""
    return _SURROGATES.sub("�", text)


def one_line(text: str) -> str:
    """`text` printable, on one line, and without invisible characters: for sentences, names and titles."""
    seen = _INVISIBLE.sub(lambda match: match[1] or match[2] or "", printable(text))
    return " ".join(seen.split())


def without_blank_ends(text: str) -> str:
    """`text` without blank lines around it; the first line keeps its indentation."""
    return _BLANK_LINES.sub("", text).rstrip()


class PrintableStream:
    """`printable` for text that arrives in pieces, where a sequence may begin in one and end in another."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> str:
        """More text; returns what can be shown. Only an unfinished sequence is held back."""
        text = self._held + piece
        # Whole sequences go first: the bytes inside one may look like the beginning of another.
        text = _SEQUENCE.sub("", text)
        match = _UNFINISHED.search(text)
        self._held = text[match.start() :] if match else ""
        return printable(text[: match.start()] if match else text)

    def end(self) -> str:
        """The text is over; returns what was held back, without its control characters."""
        held, self._held = self._held, ""
        return printable(held)
