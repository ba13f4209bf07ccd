"""Decodes several tokens per forward if the text repeats earlier text and that is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.speculation.acceptance import AcceptanceRates
from streamchat.conversation.speculation.costs import SIZES, ForwardCosts
from streamchat.conversation.speculation.ngrams import Match, NgramIndex, continuation
from streamchat.decode.install import tokens_at_once

MIN_SPEEDUP = 1.1
"""Tokens are proposed only if the expected speedup is at least this."""
MIN_RATE = 0.15
"""If the next token is accepted more rarely than this, `MIN_SPEEDUP` is out of reach."""
SINGLE_EVERY = 64
"""After this many forwards with proposals, one token is fed alone: its time is the unit of the costs."""


class Speculator:
    """Feeds a token together with proposed ones: what followed an earlier occurrence of the newest tokens.

    Whether and how many depends on the measured costs of forwards and on the rates of acceptance; both are updated with
    every token. The caller samples each token as usual, and stops at the first that was not proposed.

    Args:
        feeder: Runs the forwards; has the log with all earlier tokens of the conversation, also evicted ones.
        clock: Returns seconds since an arbitrary start.
    """

    def __init__(self, feeder: Feeder, clock: Callable[[], float] = time.perf_counter) -> None:
        self._feeder, self.clock = feeder, clock
        self._costs = ForwardCosts()
        self.start_over()

    def start_over(self) -> None:
        """Forget the text; the measured costs belong to the model and remain."""
        self._index, self._rates = NgramIndex(), AcceptanceRates()
        self.proposed = 0
        """Tokens proposed in this conversation."""
        self.accepted = 0
        """Proposed tokens that were accepted."""
        self._match: Match | None = None
        self._expected: list[int] = []
        self._proposals = 0
        self._since_single = 0
        self._forward_end: float | None = None

    @property
    def is_supported(self) -> bool:
        """Whether the model has a short path for several tokens, and the cache can remove rejected ones."""
        cache = self._feeder.cache
        plain = type(cache) is StreamingCache and all(type(layer) is StreamingLayer for layer in cache.layers)
        return plain and tokens_at_once(self._feeder.model) > 1

    def begin_reply(self) -> None:
        """Start a reply; the time since the last one does not count."""
        self._forward_end = None
        self._expected = []

    def forward(self, token: int, most: int, control: Collection[int]) -> tuple[Tensor, list[int]]:
        """Feed `token` and the proposed tokens; return the logits (n, vocabulary) after each, and the proposals.

        The proposals are not in the log: see `Feeder.forward_proposals`.

        Args:
            token: The newest token, not fed yet.
            most: Maximum number of proposals.
            control: Control tokens, which are not proposed.
        """
        log, begun = self._feeder.log, self.clock()
        self._index.update(log)
        self._match = self._index.find(log, token)
        proposals = self._choose(token, min(most, self._room()), control)
        self._proposals = len(proposals)
        logits = self._feeder.forward_proposals(token, proposals)
        self._forward_end = self.clock()
        self._costs.observe(1 + len(proposals), self._forward_end - begun)
        self._since_single = self._since_single + 1 if proposals else 0
        return logits, proposals

    def learn(self, sampled: Sequence[int]) -> None:
        """Note the tokens sampled after a forward, up to the first that was not proposed."""
        if not sampled or self._forward_end is None:
            return
        self._costs.observe_rest((self.clock() - self._forward_end) / len(sampled))
        hits = 0
        for token, expected in zip(sampled, self._expected, strict=False):
            assert self._match is not None
            self._rates.observe(self._match.length + hits, token == expected)
            if token != expected:
                break
            hits += 1
        self.proposed += self._proposals
        self.accepted += min(hits, self._proposals)

    def _choose(self, token: int, most: int, control: Collection[int]) -> list[int]:
        """Return the proposals with the highest expected speedup; none if it is too low."""
        self._expected = []
        if self._match is None:
            return []
        matched = self._match.length
        most = max(0, min(most, tokens_at_once(self._feeder.model) - 1, SIZES[-1] - 1))
        if not self._costs.known or self._since_single >= SINGLE_EVERY or self._rates.rate(matched) < MIN_RATE:
            most = 0
        found = continuation(self._feeder.log, token, self._match, max(1, most))
        end = next((at for at, each in enumerate(found) if each in control), len(found))
        self._expected = found[:end]
        count = self._best_count(matched, min(most, end))
        if count:
            self._expected = found[:count]
        return found[:count]

    def _best_count(self, matched: int, most: int) -> int:
        accepted, best, count = self._rates.expected(matched, most), MIN_SPEEDUP, 0
        largest = min(1 + most, self._costs.largest)
        for size in SIZES:
            if size > largest:
                break
            speedup = self._costs.speedup(size, accepted[size - 1])
            if speedup >= best:
                best, count = speedup, size - 1
        return count

    def _room(self) -> int:
        """Return how many proposals fit before the next eviction or rebase: speculation must not move these."""
        cache = self._feeder.cache
        return min(cache.cache_size - cache.length, cache.position_limit - cache.next_position) - 1
