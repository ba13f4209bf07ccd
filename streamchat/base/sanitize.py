"""Make untrusted text safe on a terminal: it must not move the cursor, retitle the window or reorder letters.

Use `printable` for texts, `one_line` for names and titles, and `sentence` for errors.
"""

from __future__ import annotations

import re

# Whole escape sequences: CSI, then OSC / DCS / SOS / PM / APC strings, then the short ones. Strings are bounded, so
# that a lone introducer cannot swallow a whole reply.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]{0,256}(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]{1,8}[0-~]"
    r"|\x1b[0-OQ-WYZ\\`-~]"
)
# An incomplete sequence at the end of a piece of text.
_UNFINISHED = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}\Z"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]{0,256}\x1b?\Z"
    r"|\x1b[ -/]{0,8}\Z"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")
# Embeddings, overrides, isolates and their deprecated relatives reorder text. Direction marks (U+200E, U+200F, U+061C)
# and joiners are kept in texts: scripts and emoji need them.
_REORDERING = re.compile("[\u202a-\u202e\u2066-\u206f\ufff9-\ufffb]")
# In a name, invisible characters make two names look the same. A joiner is kept between non-ASCII letters, and the tags
# of a flag are kept after it.
_INVISIBLE = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]{2,8}\U000e007f)|(?<=[^\x00-\x7f])([\u200c\u200d])(?=[^\x00-\x7f])"
    "|[\u00ad\u034f\u061c\u180e\u200b-\u200f\u2060-\u2064\ufeff\U000e0000-\U000e007f]"
)
_LINE_ENDS = re.compile("[\t\n\u2028\u2029]+")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def printable(text: str) -> str:
    """Remove terminal control sequences, control characters and bidirectional controls; newline and tab are kept.

    Lone surrogates (undecodable bytes) become U+FFFD, so the result can always be encoded as UTF-8.
    """
    return encodable(_REORDERING.sub("", _CONTROLS.sub("", _SEQUENCE.sub("", text))))


def encodable(text: str) -> str:
    """Replace lone surrogates, which neither a tokenizer nor UTF-8 accepts, by U+FFFD."""
    return _SURROGATES.sub("�", text)


def one_line(text: str) -> str:
    """Return `text` printable, on one line and without invisible characters, for sentences, names and titles."""
    seen = _INVISIBLE.sub(lambda match: match[1] or match[2] or "", printable(text))
    return " ".join(seen.split())


def sentence(text: str) -> str:
    """Return `text` printable and on one line, for errors; unlike `one_line`, it keeps spaces and invisible letters.

    A name with two spaces stays as it is, so that it can be copied.
    """
    return _LINE_ENDS.sub(" ", printable(text)).strip()


def without_blank_ends(text: str) -> str:
    """Remove leading and trailing blank lines; the first line keeps its indentation."""
    return _BLANK_LINES.sub("", text).rstrip()


class PrintableStream:
    """`printable` for text that arrives in pieces: a sequence may start in one piece and end in another."""

    def __init__(self) -> None:
        self._pending = ""

    def feed(self, piece: str) -> str:
        """Add text and return what can be shown. Only an unfinished sequence is held back."""
        text = self._pending + piece
        # Remove complete sequences first: the bytes inside one may look like the start of another.
        text = _SEQUENCE.sub("", text)
        match = _UNFINISHED.search(text)
        self._pending = text[match.start() :] if match else ""
        return printable(text[: match.start()] if match else text)

    def end(self) -> str:
        """End the text and return what was held back, without its control characters."""
        pending, self._pending = self._pending, ""
        return printable(pending)
