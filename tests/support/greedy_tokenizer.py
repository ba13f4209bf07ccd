"""A tokenizer in a few lines, whose tokens a test can foresee: the longest name in the vocabulary at each place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class GreedyTokenizer:
    """Has the parts of a tokenizer of transformers that encode and decode text.

    Args:
        names: The vocabulary. A name that starts with `^` is a token at the start of a text only.
        unknown: A name for characters without a token; without it, they are an error.
        is_fast: Whether it reports offsets.
        trims: Whether offsets exclude a space at the start of a token, as those of many byte-level tokenizers.
        last: A name for a token without text at the end of each text.
        opens: A name after which the names with `^` are used as at the start of a text.
        lowers: Whether it converts the text to lowercase first.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        unknown: str = "",
        is_fast: bool = True,
        trims: bool = False,
        last: str = "",
        opens: str = "",
        lowers: bool = False,
    ) -> None:
        self.names = [*names, *[unknown] * bool(unknown), *[last] * bool(last)]
        self.ids = {name: i for i, name in enumerate(self.names)}
        self.unk_token_id = self.ids.get(unknown)
        self.is_fast = self._has_offsets = is_fast
        self._trims, self._last, self._opens, self._lowers = trims, last, opens, lowers

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool, verbose: bool
    ) -> dict[str, Any]:
        assert return_offsets_mapping == self._has_offsets  # others raise an error
        assert not add_special_tokens
        assert not verbose
        text = text.lower() if self._lowers else text
        found, offsets, at = list[int](), list[tuple[int, int]](), 0
        while at < len(text):
            token, size = self._longest(text, at)
            space = self._trims and text[at] == " "
            found.append(token)
            offsets.append((at + space, at + size))
            at += size
        if self._last:
            found.append(self.ids[self._last])
            offsets.append((len(text), len(text)))
        return {"input_ids": found} | ({"offset_mapping": offsets} if self._has_offsets else {})

    def _longest(self, text: str, at: int) -> tuple[int, int]:
        """Return the id of the token at character `at`, and how many characters it encodes."""
        fitting = [name for name in self.names if text.startswith(name, at)]
        if at == 0 or (self._opens and text.endswith(self._opens, 0, at)):
            fitting += [name for name in self.names if name[0] == "^" and text.startswith(name[1:], at)]
        if fitting:
            best = max(fitting, key=lambda name: (len(name.removeprefix("^")), name[0] == "^"))
            return self.ids[best], len(best.removeprefix("^"))
        assert self.unk_token_id is not None, text[at:]
        return self.unk_token_id, 1

    def decode(self, ids: Sequence[int], *, clean_up_tokenization_spaces: bool = True) -> str:
        """Return the names of tokens as one text; a space before a period is dropped by default, as in older models."""
        text = "".join(self.names[token].removeprefix("^") for token in ids if self.names[token] != self._last)
        return text.replace(" .", ".") if clean_up_tokenization_spaces else text

    def convert_tokens_to_ids(self, name: str) -> int | None:
        """Return the id of a name; that of the unknown token if it is not in the vocabulary."""
        return self.ids.get(name, self.unk_token_id)
