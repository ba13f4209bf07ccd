"""Encodes text with spans in which names of control tokens are ordinary letters. Checks the ids, not the text.

A tokenizer may find a control token that the text does not show: it may normalize the text first, and a name may start
with another name. So the text is encoded, and if a span yields a control token, it is cut there and its pieces are
encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from streamchat.conversation.control_tokens import byte_ids

# Texts that can precede a piece so that it is encoded as in the middle of a text. The first one that does not merge
# with the piece is used.
_NEUTRAL = (".", "a", "\n", "1", ")", "")
Span = tuple[int, int]


class Token(NamedTuple):
    """An id, and the span of characters that it encodes."""

    id: int
    start: int
    stop: int


class SafeText:
    """Encodes text as it would be inside a longer text.

    Args:
        tokenizer: The model's tokenizer.
        control: Its control tokens, id to name.
    """

    def __init__(self, tokenizer: Any, control: Mapping[int, str]) -> None:
        self._tokenizer = tokenizer
        self._control = control
        self._unknown = tokenizer.unk_token_id

    def encode(
        self,
        text: str,
        spans: Sequence[Span] = (),
        left: str = "",
        right: str = "",
        allowed: frozenset[int] = frozenset(),
    ) -> list[Token]:
        """Return the tokens of `text`.

        Args:
            text: The text to encode.
            spans: Spans that must not yield control tokens.
            left: The text before it.
            right: The text after it.
            allowed: Control tokens that the spans may yield anyway.
        """
        if not text:
            return []
        tokens = self._inside(text, left, right)
        cuts = self._cuts(text, spans, tokens, allowed)
        if not cuts:
            if len(text) == 1 and spans and any(self._is_control(token, text, allowed) for token in tokens):
                return self._as_bytes(text) or tokens
            return tokens
        out: list[Token] = []
        edges = [0, *cuts, len(text)]
        for start, stop in pairwise(edges):
            piece = text[start:stop]
            within = [(max(a, start) - start, min(b, stop) - start) for a, b in spans if a < stop and b > start]
            before = left if start == 0 else self._apart_from(piece)
            found = self.encode(piece, within, before, right if stop == len(text) else "", allowed)
            out += [Token(token, a + start, b + start) for token, a, b in found]
        return out

    def _cuts(self, text: str, spans: Sequence[Span], tokens: Sequence[Token], allowed: frozenset[int]) -> list[int]:
        """Return where to cut so that the spans yield no control token."""
        cuts: set[int] = set()
        for token in tokens:
            if not self._is_control(token, text, allowed):
                continue
            start, stop = token.start, max(token.stop, token.start + 1)
            for first, last in spans:
                if start < last and stop > first:
                    if start < first:
                        cuts.add(first)
                    elif stop > last:
                        cuts.add(last)
                    else:
                        cuts |= {start + 1} if stop - start > 1 else {start, stop}
        return sorted(cut for cut in cuts if 0 < cut < len(text))

    def _is_control(self, token: Token, text: str, allowed: frozenset[int]) -> bool:
        if token.id not in self._control or token.id in allowed:
            return False
        # text without a token encodes to the unknown token, which is not a control token that the user wrote
        return token.id != self._unknown or text[token.start : token.stop].strip() == self._control[token.id]

    def _as_bytes(self, char: str) -> list[Token]:
        """Encode a character whose only token is a control token as bytes; empty without tokens for its bytes."""
        return [Token(token, 0, 1) for token in byte_ids(self._tokenizer, char, self._control)]

    def _inside(self, text: str, left: str, right: str) -> list[Token]:
        """Return the tokens that start in `text` between `left` and `right`.

        If a token spans an end of `text`, the context at that end is dropped or replaced.
        """
        for before in (left, *_NEUTRAL):
            tokens = self.tokens(before + text + right)
            start, stop = len(before), len(before) + len(text)
            if right and any(token.start < stop < token.stop for token in tokens):
                right = ""
                tokens = self.tokens(before + text)
            if not any(token.start < start < token.stop for token in tokens):
                break
        return [
            Token(token.id, token.start - start, token.stop - start)
            for token in tokens
            if start <= token.start and (token.start < stop or not right)
        ]

    def _apart_from(self, piece: str) -> str:
        """Return a text to precede `piece`, so that it is encoded as in the middle of a text."""
        return next(left for left in _NEUTRAL if not self._touches(left, piece[:32]))

    def _touches(self, left: str, piece: str) -> bool:
        """Return whether `left` merges with `piece`, or is a control token, after which some tokenizers add a space."""
        return any(
            token.start < len(left) and (token.stop > len(left) or token.id in self._control)
            for token in self.tokens(left + piece)
        )

    def tokens(self, text: str) -> list[Token]:
        """Return all tokens of `text`, without gaps between them."""
        if not text:
            return []
        # verbose=False: no warning about texts longer than the model's context
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = [int(token) for token in made["input_ids"]]
        offsets = made.get("offset_mapping") or self._offsets(ids, len(text))
        out, at = [], 0
        for token, (start, stop) in zip(ids, offsets, strict=True):
            # some tokenizers exclude the space at the start of a token from its offsets
            out.append(Token(token, min(start, at), max(stop, start)))
            at = max(at, stop)
        return out

    def _offsets(self, ids: Sequence[int], length: int) -> list[Span]:
        """Return the spans of tokens by decoding them, for tokenizers that do not report offsets."""
        out, at = [], 0
        for token in ids:
            size = len(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
            out.append((min(at, length), min(at + size, length)))
            at += size
        return out
