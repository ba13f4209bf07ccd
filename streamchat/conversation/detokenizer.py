"""Decodes token ids to text one id at a time, without broken characters and with minimal delay."""

from __future__ import annotations

import codecs
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Number of earlier ids to decode new ones with: some tokenizers drop the space of the first piece of a text.
CONTEXT = 4


class Detokenizer:
    """Streams text so that the joined pieces equal the tokenizer's decoding of all ids at once.

    Two kinds of tokenizers spread one character over several tokens:

    - Byte-level ones (GPT-2, Llama 3, Qwen). Only an unfinished character at the very end is held back; a replacement
      character inside the text is real and is shown.
    - Those with byte tokens, `<0xE2>`, for characters without a token (Llama 2, Mistral, Gemma). Their bytes are
      decoded here, because the library shows a sequence of them as replacement characters until all of it is valid. If
      a sequence never becomes valid, the complete characters in it are shown, which the library would lose.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes = _byte_tokens(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []
        self._shown = ""
        """Text of `_ids` that was already returned."""
        self.complete = True
        """Whether no unfinished character is held back."""

    def push(self, token: int) -> str:
        """Return the text that `token` adds; '' while a character is unfinished."""
        value = self._bytes.get(token, 0)
        if value >= 0x80:
            return self._push_byte(value)
        ended = self._utf8.decode(b"", final=True)
        self._ids.append(token)
        text = self._decode(self._ids)
        # Whatever follows, an unfinished UTF-8 sequence shows as exactly one replacement character at the end.
        stable = text[:-1] if text.endswith(REPLACEMENT) else text
        self.complete = stable == text
        new = stable[len(self._shown) :] if stable.startswith(self._shown) else ""
        if new:
            self._shown = stable
        if self.complete and len(self._ids) > 2 * CONTEXT and (context := self._decode(self._ids[-CONTEXT:])):
            # skipped if these ids are only control tokens, which give no context
            self._ids, self._shown = self._ids[-CONTEXT:], context
        return ended + new

    def flush(self) -> str:
        """Return the text held back at the end of the ids: a replacement character for an unfinished character."""
        self.complete = True
        return self._utf8.decode(b"", final=True) + self._rest()

    def _push_byte(self, value: int) -> str:
        """Decode one byte of a character of several bytes."""
        text = self._rest() + self._utf8.decode(bytes([value]))
        self.complete = not self._utf8.getstate()[0]
        # a period replaces the earlier ids: the library must not see part of a byte sequence
        self._ids = [token for token, byte in self._bytes.items() if byte == ord(".")]
        self._shown = self._decode(self._ids)
        return text

    def _rest(self) -> str:
        """Return the text of `_ids` that was not returned yet."""
        text, shown = self._decode(self._ids), self._shown
        self._shown = text
        return text[len(shown) :] if text.startswith(shown) else ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _byte_tokens(tokenizer: Any) -> dict[int, int]:
    """Return id -> byte of the tokens `<0x00>` to `<0xFF>`; empty unless the tokenizer has and decodes all of them."""
    names = [f"<0x{value:02X}>" for value in range(256)]
    if tokenizer.convert_tokens_to_ids(names[0]) in (None, tokenizer.unk_token_id):  # true of most tokenizers
        return {}
    ids = tokenizer.convert_tokens_to_ids(names)
    if len(set(ids) - {None, tokenizer.unk_token_id}) < 256 or tokenizer.decode([ids[ord(".")]]) != ".":
        return {}
    return {int(token): value for value, token in enumerate(ids)}
