"""Text of a model on a terminal: no control sequence gets through, whether the text arrives at once or in pieces."""

from __future__ import annotations

import re

from streamchat.base.sanitize import PrintableStream, one_line, printable
from streamchat.frontend.terminal_codes import LinkStream, linked, notification_code, title_code
from tools.fuzz.target import Target

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u206f\ud800-\udfff]")
LINK = re.compile(r"\x1b\]8;;(https?://[!-~]*)?\x1b\\")


def run(data: bytes) -> None:
    """Show a text at once, and in pieces whose size the first byte gives."""
    size = (data[0] if data else 0) % 16 + 1
    text = data[1:].decode("utf-8", "surrogateescape")
    stream, links = PrintableStream(), LinkStream()
    pieces = [stream.feed(text[at : at + size]) for at in range(0, len(text), size)] + [stream.end()]
    shown = "".join(pieces)
    assert CONTROLS.search(shown) is None
    assert CONTROLS.search(printable(text)) is None
    assert one_line(text).isprintable() or "\u2028" in text or not one_line(text).isascii()
    with_links = "".join(map(links.feed, pieces)) + links.end()
    assert LINK.sub("", with_links) == shown
    assert LINK.sub("", linked(shown)) == shown
    assert CONTROLS.search(LINK.sub("", with_links)) is None
    assert title_code(text).count("\x1b") == 2
    assert notification_code("osc777", text, text).count("\x1b") == 2


def seeds() -> dict[str, bytes]:
    """Sequences of every kind, and addresses."""
    return {
        "csi": b"\x03a\x1b[31mb\x1b[2J\xc2\x9b1mc",
        "osc": b"\x07\x1b]0;title\x07x\x1b]8;;http://a\x1b\\y\x1bPq\x1b\\\x1b(0",
        "links": b"\x05see https://a.b/c_(d). and http://x",
        "letters": "\x02\u202eabc\u2069 👩‍🚀 \u200b\u2028".encode(),
    }


TARGET = Target(
    "shown_text",
    run,
    seeds,
    ("streamchat.base.sanitize", "streamchat.frontend.terminal_codes"),
    (),
    (
        b"\x1b[",
        b"\x1b]",
        b"\x07",
        b"\x1b\\",
        b"\xc2\x9b",
        b"\xc2\x9c",
        b"http://",
        b"https://",
        "\u202e".encode(),
        b"(",
        b"\n",
    ),
    max_bytes=600,
    suite_runs=500,
)
