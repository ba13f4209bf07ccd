"""Detokenizing one id at a time: the joined pieces equal the text of all ids."""

from __future__ import annotations

from functools import cache
from typing import Any

from streamchat.base.thinking import ThinkingStream, split
from streamchat.conversation.detokenizer import Detokenizer
from tests.support import toy_tokenizer as toy
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Decode ids of two bytes; the first byte of the input chooses the tokenizer."""
    tokenizer = tokenizers()[data[0] % 2 if data else 0]
    size = len(tokenizer)
    ids = [int.from_bytes(data[at : at + 2], "big") % size for at in range(1, len(data) - 1, 2)]
    stream = Detokenizer(tokenizer)
    text = "".join([*map(stream.push, ids), stream.flush()])
    if not data or data[0] % 2 == 0:  # the library shows other characters for bytes that are not valid
        assert text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text.encode()
    pieces = ThinkingStream()
    parts = [part for letter in text for part in pieces.feed(letter)] + pieces.end()
    said = tuple("".join(part.text for part in parts if part.kind == kind) for kind in ("thought", "answer"))
    assert said == split(text)


@cache
def tokenizers() -> tuple[Any, Any]:
    """Return a byte-level tokenizer, and one with tokens for bytes."""
    return toy.toy_tokenizer(), toy.byte_token_tokenizer()


def seeds() -> dict[str, bytes]:
    """Words, characters of several bytes, and reasoning."""
    found = {}
    for kind, text in (
        ("words", "Tell me a story."),
        ("letters", "Köln 三 🙂"),
        ("thought", "<think>\na\n</think>\n\nb"),
    ):
        for number, tokenizer in enumerate(tokenizers()):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            found[f"{kind}-{number}"] = bytes([number]) + b"".join(token.to_bytes(2, "big") for token in ids)
    return found


TARGET = Target(
    "detokenizer",
    run,
    seeds,
    ("streamchat.conversation.detokenizer", "streamchat.base.thinking"),
    (),
    max_bytes=128,
    suite_runs=300,
)
