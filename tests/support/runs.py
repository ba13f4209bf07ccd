"""Runs of token indices."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from streamchat.cache.eviction.policy import Run


def runs_of(indices: Iterable[int], end: int) -> tuple[Run, ...]:
    """Return the runs of the `indices` that are less than `end`."""
    inside = sorted(index for index in indices if index < end)
    groups = ([index for _, index in group] for _, group in groupby(enumerate(inside), lambda pair: pair[1] - pair[0]))
    return tuple((group[0], group[-1] + 1) for group in groups)
