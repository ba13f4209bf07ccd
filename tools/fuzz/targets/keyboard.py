"""Bytes from a terminal (keys, pastes, answers of the terminal) to the app and the prompt."""

from __future__ import annotations

import codecs

from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress
from textual.events import Key, Paste, Resize

from streamchat.tui.key_parser import MAX_CELLS, KeyParser
from streamchat.tui.keyboard import END, ESCAPE, PasteGuard
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Parse the bytes in blocks whose size the first byte gives."""
    size = (data[0] if data else 0) % 32 + 1
    blocks = [data[at : at + size] for at in range(1, len(data), size)]
    decoder, guard, parser = codecs.getincrementaldecoder("utf-8")("replace"), PasteGuard(), KeyParser()
    for block in blocks:
        text = guard.feed(decoder.decode(block))
        for event in parser.feed(text):
            if isinstance(event, Paste):
                assert ESCAPE not in event.text
            if isinstance(event, Resize):
                assert all(0 < cells <= MAX_CELLS for cells in event.size)
        for _event in parser.tick():
            pass
    last = [*parser.feed("\x1b[201~x"), *parser.end()][-1]
    assert isinstance(last, Key), "input goes on"
    assert last.key == "x"
    keys: list[KeyPress] = []
    prompt = Vt100Parser(keys.append)
    again = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for block in blocks:
        prompt.feed(again.decode(block))
    prompt.flush()
    assert END not in "".join(key.data for key in keys if key.key == "<bracketed-paste>")


def seeds() -> dict[str, bytes]:
    """Keys, a paste, a mouse, and what terminals answer."""
    return {
        "keys": b"\x08hi\r\x1b[A\x1b[1;5C\x1bOP\x1b[3~\x7f\x03",
        "paste": b"\x1f\x1b[200~two\nlines \x1b[31m\x1b[201~\r",
        "kitty": b"\x04\x1b[97;5u\x1b[13;2u\x1b[57441;2:3u",
        "mouse": b"\x1f\x1b[<0;10;20M\x1b[<64;1;1m\x1b[I\x1b[O",
        "answers": b"\x1f\x1b[?2026;2$y\x1b[?1;2c\x1b[5;10R\x1b[48;24;80;480;1280t\x1bP>|xterm\x1b\\",
        "letters": "\x03Köln 三🙂".encode() + b"\xff\xc3",
    }


TARGET = Target(
    "keyboard",
    run,
    seeds,
    (
        "streamchat.tui.keyboard",
        "streamchat.tui.key_parser",
        "textual._xterm_parser",
        "textual._parser",
        "prompt_toolkit.input",
    ),
    (),
    (
        b"\x1b[200~",
        b"\x1b[201~",
        b"\x1b[",
        b"\x1b",
        b";",
        b"u",
        b"~",
        b"\x1b[<",
        b"9999999999999999999",
        b"\x1b[?",
        b"\xff",
    ),
    max_bytes=512,
    suite_runs=300,
)
