"""Slash commands: each gets an answer, and no command reaches the model."""

from __future__ import annotations

from streamchat.config.settings import setting_fields
from streamchat.frontend.slash.registry import parse
from tests.support.desk import Desk
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Run a line as a command, and complete it."""
    line = data.decode("utf-8", "surrogateescape")
    desk = Desk()
    desk.board.session = "nothing"
    result = desk.registry.run(desk.context, line)
    assert (result is None) == (parse(line) is None)
    if result is not None:
        assert isinstance(result.text, str)
        assert result.text.strip() or not result.error
    for whole, note in desk.registry.completions(desk.context, line):
        assert whole.startswith("/")
        assert isinstance(note, str)
    message = desk.registry.unescape(line)
    assert desk.registry.unescape(desk.registry.escape(message)) == message


def seeds() -> dict[str, bytes]:
    """One line for each command."""
    arguments = {
        "set": "temperature 0.5",
        "system": "be brief",
        "pin": "2",
        "unpin": "all",
        "export": "a.md",
        "import": "a.json 2",
        "read": '"a b.txt" why?',
        "recall": '"the sea" OR dragon*',
        "quote": "1",
        "keep": "1",
        "resume": "ab",
        "model": "tiny",
        "queue": "drop 1",
        "think": "on",
        "edit": "again",
    }
    lines = {command.name: f"/{command.name} {arguments.get(command.name, '')}" for command in Desk().registry}
    return {name: line.strip().encode() for name, line in lines.items()} | {"message": b"//set up", "path": b"/usr/bin"}


TARGET = Target(
    "slash",
    run,
    seeds,
    ("streamchat.frontend", "streamchat.config", "streamchat.store.search"),
    (),
    (b"/", b" ", b"=", b"none", b"last", b"all", b"~", b"/dev/zero", b"\0", b"\xed\xa0\x80", "²".encode(), b"nan", b'"',
     *(name.encode() for name in setting_fields())),
    max_bytes=300,
    suite_runs=100,
)  # fmt: skip
