"""Finds the control tokens of a tokenizer. A user's text must never be encoded as one."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

_BYTE_LEVEL = ByteLevel(add_prefix_space=False)
"""Writes each byte as the character that byte-level tokenizers use for it."""


def control_tokens(tokenizer: Any, written: str = "") -> dict[int, str]:
    """Return the control tokens of a tokenizer, id to name.

    These are its special tokens, and other added tokens that the chat template writes. Added tokens that are only
    vocabulary (letters, words, emoji, HTML tags, runs of spaces) are text.

    Args:
        tokenizer: The model's tokenizer.
        written: The chat template and the texts that it writes around messages.
    """
    found = {}
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.special or (_reads_as_mark(added.content) and added.content in written):
            found[int(token)] = str(added.content)
    for token, name in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True):
        if token is not None:  # a name that is not in the vocabulary
            found[int(token)] = str(name)
    return {token: name for token, name in found.items() if name.strip()}


def byte_ids(tokenizer: Any, char: str, control: Container[int]) -> list[int]:
    """Return the ids of the single bytes of `char`, none of them in `control`; empty if there are no such tokens."""
    encoded = char.encode("utf-8", "replace")
    [(byte_level, _)] = _BYTE_LEVEL.pre_tokenize_str(encoded.decode())  # one character is one piece
    for names in (list(byte_level), [f"<0x{byte:02X}>" for byte in encoded]):
        ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
        if all(token not in (None, tokenizer.unk_token_id) and token not in control for token in ids):
            return [int(token) for token in ids]
    return []


def _reads_as_mark(name: str) -> bool:
    """Return whether `name` is not just a letter, a word or spaces, which a template may write as text."""
    return len(name) > 1 and not all(char.isalnum() or char.isspace() for char in name)
