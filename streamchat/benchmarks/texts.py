"""Texts to score: files in any common encoding, one document each."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamchat.base.errors import ConfigError
from streamchat.base.formatting import human_bytes, plural
from streamchat.base.sanitize import one_line
from streamchat.conversation.encoding import TextEncoder
from streamchat.verify.text import help_topics

# longest first, because the byte order mark of UTF-32 starts with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
FALLBACK = "windows-1252"
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
    shown = one_line(path)
    try:
        if path == "-":
            name, content = "standard input", sys.stdin.buffer.read()
        else:
            file = Path(path).expanduser()
            if file.is_dir():
                raise ConfigError(f"{shown} is a folder; give the text files in it")
            if (size := file.stat().st_size) > MAX_BYTES:
                raise ConfigError(
                    f"{shown} has {human_bytes(size)}, more than the maximum of {human_bytes(MAX_BYTES)}; split it"
                )
            name, content = one_line(file.name), file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    text, notes = decode(content, name)
    return Document(name, text, tuple(notes))


def decode(content: bytes, name: str) -> tuple[str, list[str]]:
    """Return the text of `content` with normalized line ends, and notes about the decoding.

    Uses the encoding of a byte order mark, else UTF-8, else Windows-1252 with undefined bytes replaced by U+FFFD.

    Raises:
        ConfigError: `content` is not text.
    """
    notes = []
    encoding = next((known for mark, known in _MARKS if content.startswith(mark)), None)
    if encoding is None and b"\0" in content:
        raise ConfigError(f"{name} is not a text file (byte {content.index(0)} is NUL)")
    try:
        text = content.decode(encoding or "utf-8")
        if encoding not in (None, "utf-8-sig"):
            notes.append(f"{name} is {encoding.upper()}.")
        elif encoding:
            notes.append(f"{name} starts with a byte order mark, which was removed.")
    except UnicodeDecodeError as error:
        if encoding is not None and encoding != "utf-8-sig":
            raise ConfigError(f"{name} starts as {encoding.upper()} and is damaged at byte {error.start}") from None
        text = content.removeprefix(codecs.BOM_UTF8).decode(FALLBACK, errors="replace")
        lost = text.count("\ufffd")
        unknown = f", with {plural(lost, 'undefined byte')} replaced by U+FFFD" if lost else ""
        notes.append(f"{name} is not UTF-8 (byte {error.start}); it was decoded as Windows-1252{unknown}.")
    if "\r" in text:
        notes.append(f"{name} has carriage returns; its line ends were normalized.")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, notes


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
