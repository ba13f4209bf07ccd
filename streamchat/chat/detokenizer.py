"""Token ids to text, one id at a time, without broken characters and without holding back more than it must."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Ids kept as context in front of new ones: some tokenizers write the first piece of a text without its space.
CONTEXT = 4


class Detokenizer:
    """Streams text so that the joined pieces equal the tokenizer's decoding of all ids at once.

    A byte-level tokenizer may spread one character over several tokens. Only such an unfinished character at the very
    end is held back; a replacement character inside the text is real and is shown.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        """How many of `_ids` are context, already shown."""
        self._shown = ""
        """Text of `_ids` that was already returned."""
        self.complete = True
        """No unfinished character is held back."""

    def push(self, token: int) -> str:
        """Text that `token` adds, '' while a character is unfinished."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Whatever follows, an unfinished UTF-8 sequence shows as exactly one replacement character at the end.
        stable = text[:-1] if text.endswith(REPLACEMENT) else text
        self.complete = stable == text
        new = stable[len(self._shown) :] if stable.startswith(self._shown) else ""
        if new:
            self._shown = stable
        if self.complete and len(self._ids) > 2 * CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            self._shown = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """What is held back at the end of the ids: an unfinished character, as a replacement character."""
        text = self._decode(self._ids)
        rest = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown = text
        self.complete = True
        return rest

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
