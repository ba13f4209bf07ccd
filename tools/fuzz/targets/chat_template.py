"""Chat templates: plain lines replace those that fail or exceed the limits on time and memory."""

from __future__ import annotations

from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.template.arguments import read_names
from streamchat.conversation.template.format import choose_format
from tests.support import toy_tokenizer as toy
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Choose a format for the template, and encode a turn with it."""
    template = data.decode("utf-8", "replace")
    read_names(template)
    tokenizer = toy.toy_tokenizer(template)
    chosen = choose_format(tokenizer, "auto", "Be kind.")
    assert chosen.name == "template" or not template or any("cannot be used" in note for note in chosen.notes)
    for note in chosen.notes:
        assert note == " ".join(note.split()), note
    encoder = ChatEncoder(tokenizer, chosen)
    assert chosen.message("hello") in tokenizer.decode(encoder.turn("hello", first=True))


def seeds() -> dict[str, bytes]:
    """Templates shaped like those of models."""
    names = ("CHATML", "THINKING", "INSIDE", "NO_SYSTEM", "CHANNELS", "CLOCK", "SWITCHED", "LINES", "RAISES", "DROPS")
    return {name.lower(): getattr(toy, name).encode() for name in names} | {"empty": b""}


WORDS = (b"{% for m in messages %}", b"{% endfor %}", b"{{ m['content'] }}", b"{{ m.role }}", b"{% if loop.last %}",
         b"{% endif %}", b"{% set x = messages[1:] %}", b"{% macro f() %}", b"{% generation %}", b"range(10**9)",
         b"| tojson", b"raise_exception('\x1b[2J\\n')", b"strftime_now('%')", b"{% include 'a' %}", b"'a' * 10**10",
         b"9 ** 99999999", b"|center(10**10)", b"'%9999999999d' % 1", b"'{:9999999999}'.format(1)",
         b"|round(-9999999999)", b".replace('a', 'b' * 100000)", b"namespace(a=1)", b"add_generation_prompt",
         b"|map('upper')|join", b"{#", b"{% break %}")  # fmt: skip
TARGET = Target(
    "chat_template", run, seeds, ("streamchat.conversation.template",), words=WORDS, max_bytes=1024, suite_runs=30
)
