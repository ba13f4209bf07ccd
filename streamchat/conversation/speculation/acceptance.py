"""Estimates how often proposed tokens are accepted, by the number of tokens that matched before them."""

from __future__ import annotations

import bisect

BUCKETS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of matched tokens that have an estimate of their own; others belong to the next lower one."""
ASSUMED = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.85, 0.9, 0.95)
"""Rate of each bucket before anything was observed."""
ASSUMED_WEIGHT = 4.0
"""Number of observations that an assumed rate counts as."""
DECAY = 0.98
"""An estimate follows about the last 50 observations."""


class AcceptanceRates:
    """Rates of accepted tokens. Most observations cost nothing: a token that follows a match is compared with the one
    that would have been proposed."""

    def __init__(self) -> None:
        self._accepted = [rate * ASSUMED_WEIGHT for rate in ASSUMED]
        self._observed = [ASSUMED_WEIGHT] * len(BUCKETS)

    def observe(self, matched: int, accepted: bool) -> None:
        """Add an observation: whether the token after `matched` matching ones was the expected one."""
        bucket = _bucket(matched)
        self._accepted[bucket] = DECAY * self._accepted[bucket] + accepted
        self._observed[bucket] = DECAY * self._observed[bucket] + 1

    def rate(self, matched: int) -> float:
        """Return the expected rate of accepted tokens after `matched` matching ones."""
        bucket = _bucket(matched)
        return self._accepted[bucket] / self._observed[bucket]

    def expected(self, matched: int, most: int) -> list[float]:
        """Return the expected number of accepted tokens for 0, 1, ... `most` proposed tokens."""
        total, reached, found = 0.0, 1.0, [0.0]
        for count in range(most):
            reached *= self.rate(matched + count)
            total += reached
            found.append(total)
        return found


def _bucket(matched: int) -> int:
    return max(0, bisect.bisect_right(BUCKETS, matched) - 1)
