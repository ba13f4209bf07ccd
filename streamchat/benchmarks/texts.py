"""Texts to score: files in any common encoding, one document each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamchat.base.paths import user_path
from streamchat.base.sanitize import one_line
from streamchat.base.text_files import STDIN, read_stdin, read_text
from streamchat.conversation.encoding import TextEncoder
from streamchat.verify.text import help_topics

MAX_BYTES = 200_000_000
"""Maximum bytes of one file: a tokenizer needs about ten times as much memory."""


@dataclass(frozen=True)
class Document:
    """One text, scored as a separate stream."""

    name: str
    text: str
    notes: tuple[str, ...] = ()
    """Notes about how its bytes were decoded."""


@dataclass(frozen=True)
class Tokens:
    """A document as ids."""

    name: str
    ids: list[int] = field(repr=False)
    """Ids to feed, with the BOS token first if the model's tokenizer adds one."""
    total: int
    """Number of tokens of the whole document."""


def default_document() -> Document:
    """Return the text of `help("topics")`, which is part of Python; it differs slightly between versions."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Document(f"Python {version}'s own help topics", help_topics())


def read_documents(paths: Sequence[str]) -> list[Document]:
    """Read the documents of these files; '-' is standard input. Without paths, return the default text.

    Raises:
        ConfigError: A file cannot be read, or is not text.
    """
    if not paths:
        return [default_document()]
    documents = [_read(path) for path in paths]
    names = [document.name for document in documents]
    # files with the same name in different folders are named by path
    return [
        replace(document, name=one_line(path)) if names.count(document.name) > 1 else document
        for path, document in zip(paths, documents, strict=True)
    ]


def _read(path: str) -> Document:
    if path == STDIN:
        name, decoded = "standard input", read_stdin(guess=True)
    else:
        name, decoded = one_line(user_path(path).name), read_text(path, max_bytes=MAX_BYTES, guess=True)
    return Document(name, decoded.text, tuple(f"{name} {note}." for note in decoded.notes))


def tokenize(document: Document, tokenizer: Any, max_tokens: int) -> Tokens:
    """Return the ids of a document, after a BOS token if the tokenizer adds one.

    Names of control tokens in the text are encoded as plain text.

    Args:
        document: The text.
        tokenizer: Tokenizer of the model.
        max_tokens: Maximum tokens of the text; 0 = all.
    """
    ids = TextEncoder(tokenizer).text(document.text)
    total = len(ids)
    if max_tokens:
        ids = ids[:max_tokens]
    bos = tokenizer.bos_token_id
    if ids and bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]:
        ids = [bos, *ids]
    return Tokens(document.name, ids, total)
