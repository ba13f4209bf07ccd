"""DRY ("don't repeat yourself"): a penalty for tokens that would continue a sequence that occurred before.

The penalty grows with the length of the repeated sequence, so that it ends loops but leaves single words alone. Names
and formula are those of llama.cpp and koboldcpp: a token that would extend a repeated sequence of n tokens loses
`multiplier * base ** (n - allowed_length)` from its logit, if n is at least `allowed_length`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from streamchat.config.settings import Settings
from streamchat.conversation.log import TokenLog

LARGEST = 1e9
"""Largest penalty: enough to exclude a token, and finite."""
ESCAPES = {"\\n": "\n", "\\t": "\t", "\\s": " ", "\\\\": "\\"}


class RepeatedSequences:
    """For each of the latest tokens, the number of tokens before it that equal the newest tokens.

    Takes a few operations of NumPy per token, whatever repeats. No sequence crosses a token that ends one.

    Args:
        span: Number of latest tokens to look at.
    """

    def __init__(self, span: int) -> None:
        self.span = span
        self._ids = np.zeros(2 * span, dtype=np.int64)
        # self._lengths[p]: length of the longest common end of the text before p and the whole text
        self._lengths = np.zeros(2 * span, dtype=np.int64)
        self._count = 0

    def start(self, ids: Sequence[int], limit: int) -> None:
        """Set the text to the latest of `ids`, of which the newest `limit` belong to no earlier sequence."""
        ids = ids[-self.span :]
        count = self._count = len(ids)
        self._ids[:count] = ids
        self._lengths[:] = 0
        positions, length = np.arange(1, count), 0
        while length < limit and len(positions):
            positions = positions[self._ids[positions - 1 - length] == self._ids[count - 1 - length]]
            length += 1
            self._lengths[positions] = length
            positions = positions[positions > length]

    def append(self, token: int, *, ends_sequence: bool) -> None:
        """Add a token; no sequence crosses it if it `ends_sequence`."""
        if self._count == len(self._ids):
            self._drop_oldest()
        first, count = max(0, self._count - self.span), self._count
        lengths = self._lengths[first:count]
        longer = np.where(self._ids[first:count] == token, lengths + 1, 0)
        self._lengths[first + 1 : count + 1] = 0 if ends_sequence else longer
        self._ids[count] = token
        self._count += 1

    def continuations(self, least: int) -> dict[int, int]:
        """Return each token that followed an earlier occurrence of the newest `least` tokens or more.

        Returns:
            Token id -> number of repeated tokens, the largest if it followed several.
        """
        first, count = max(0, self._count - self.span), self._count
        # tokens older than the span do not count
        lengths = np.minimum(self._lengths[first:count], np.arange(count - first))
        places = np.flatnonzero(lengths >= least)
        if not len(places):
            return {}
        tokens, which = np.unique(self._ids[first + places], return_inverse=True)
        longest = np.zeros(len(tokens), dtype=np.int64)
        np.maximum.at(longest, which, lengths[places])
        return dict(zip(tokens.tolist(), longest.tolist(), strict=True))

    def _drop_oldest(self) -> None:
        kept = slice(self._count - self.span, self._count)
        self._ids[: self.span], self._lengths[: self.span] = self._ids[kept].copy(), self._lengths[kept].copy()
        self._count = self.span


class DryPenalty:
    """The penalties for the next token of a reply. Follows the token log, to which the reply only appends.

    Args:
        settings: The current settings.
        log: The token log.
        cache_size: The cache budget: older tokens are never looked at.
        control: Control tokens. No sequence crosses them, and they have no penalty, so that a reply can always end.
        text_of: Returns the text of one token.
    """

    def __init__(
        self,
        settings: Settings,
        log: TokenLog,
        cache_size: int,
        control: Collection[int],
        text_of: Callable[[int], str],
    ) -> None:
        self._multiplier, self._base = settings.dry_multiplier, settings.dry_base
        self._allowed = settings.dry_allowed_length
        self._breakers = parse_breakers(settings.dry_sequence_breakers)
        self._longest = max((len(each) for each in self._breakers), default=0)
        self._log, self._control, self._text_of = log, control, text_of
        last_n = settings.dry_penalty_last_n
        self._sequences = RepeatedSequences(cache_size if last_n < 0 else min(last_n, cache_size))
        self._texts: dict[int, str] = {}
        self._seen: int | None = None

    def penalties(self) -> dict[int, float]:
        """Return token id -> what to subtract from its logit, for the token after the end of the log."""
        self._update()
        found = self._sequences.continuations(self._allowed)
        return {token: self._amount(length) for token, length in found.items() if token not in self._control}

    def _amount(self, length: int) -> float:
        try:
            return min(LARGEST, self._multiplier * self._base ** (length - self._allowed))
        except OverflowError:
            return LARGEST

    def _update(self) -> None:
        ids = self._log.ids
        if self._seen is None:
            end = len(ids)
            start = max(0, end - self._sequences.span)
            last = next((at for at in range(end - 1, start, -1) if self._ends_sequence(at)), start)
            self._sequences.start(ids, end - 1 - last)
        else:
            for at in range(self._seen, len(ids)):
                self._sequences.append(ids[at], ends_sequence=self._ends_sequence(at))
        self._seen = len(ids)

    def _ends_sequence(self, at: int) -> bool:
        """Return whether a sequence breaker ends inside the token at log index `at`, or it is a control token."""
        token = self._log.ids[at]
        if token in self._control:
            return True
        if not self._breakers:
            return False
        own, before = self._text(token), ""
        while at > 0 and len(before) < self._longest - 1 and self._log.ids[at - 1] not in self._control:
            at -= 1
            before = self._text(self._log.ids[at]) + before
        text = before + own
        return any(text.find(each, max(0, len(before) - len(each) + 1)) >= 0 for each in self._breakers)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._text_of(token)
        return self._texts[token]


def parse_breakers(text: str) -> tuple[str, ...]:
    """Return the sequence breakers of the setting: separated by spaces, with \\n, \\t, \\s (a space) and \\\\.

    The word `none` is an empty list, as in llama.cpp: `/set` needs a value.
    """
    if text.strip() == "none":
        return ()
    return tuple(dict.fromkeys(_unescaped(each) for each in text.split()))


def _unescaped(text: str) -> str:
    out, at = "", 0
    while at < len(text):
        pair = text[at : at + 2]
        out += ESCAPES.get(pair, text[at])
        at += 2 if pair in ESCAPES else 1
    return out


def dry_penalty(
    settings: Settings, log: TokenLog, cache_size: int, control: Collection[int], tokenizer: Any
) -> DryPenalty | None:
    """Return the penalties of a reply; None if they are off."""
    if not settings.dry_multiplier or not settings.dry_penalty_last_n:
        return None

    def text_of(token: int) -> str:
        return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))

    return DryPenalty(settings, log, cache_size, control, text_of)
