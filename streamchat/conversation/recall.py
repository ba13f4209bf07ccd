"""Brings evicted turns back into the cache from their keys and values, pinned and without a prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamchat.base.errors import CacheError, ConfigError
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.policy import Run
from streamchat.cache.history import evicted_by
from streamchat.cache.paging import can_page_in, missing_runs, page_in
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.log import TokenLog
from streamchat.conversation.pins import require_free_window

FindEvicted = Callable[[Sequence[Run]], Sequence[EvictedTokens]]
"""Returns evicted tokens that have some of these log indices, oldest first."""


@dataclass(frozen=True)
class PagedIn:
    """An evicted turn that is cached again."""

    tokens: int
    """How many came back."""
    seconds: float


def page_in_turn(cache: StreamingCache, log: TokenLog, number: int, find: FindEvicted) -> PagedIn:
    """Put the evicted tokens of turn `number` back into the cache and pin the turn.

    The oldest other tokens are evicted if there is no room.

    Args:
        cache: The cache.
        log: Its tokens and turns.
        number: The turn.
        find: Finds tokens that are not in the cache's history.

    Raises:
        ConfigError: The turn does not exist, is cached, or cannot come back; nothing has changed then.
    """
    started = time.perf_counter()
    if not 1 <= number <= len(log.turns):
        raise ConfigError(f"turn {number} does not exist; the conversation has {len(log.turns)}")
    turn = log.turns[number - 1]
    assert turn.end is not None
    run = (max(turn.start, cache.num_sink_tokens), turn.end)
    missing = missing_runs(cache, [run])
    if not missing:
        raise ConfigError(f"turn {number} is in context already; /pin {number} retains it")
    if not can_page_in(cache):
        raise ConfigError("tokens cannot be paged into this model's cache")
    count = sum(stop - first for first, stop in missing)
    require_free_window(cache, run, count, f"paging in turn {number}")
    kept = kept_tokens(cache, missing, find)
    if kept is None:
        raise ConfigError(f"the keys and values of turn {number} are not archived")
    pins = cache.pins
    cache.recalled = ()  # there may be no room for both
    cache.pin(*run)  # what is still cached of the turn stays
    try:
        cache.make_room(count, "page_in")
        tokens = page_in(cache, kept, missing)
    except CacheError as error:
        cache.pins = pins
        raise ConfigError(f"turn {number} cannot be paged in: {error}") from error
    return PagedIn(tokens, time.perf_counter() - started)


def kept_tokens(cache: StreamingCache, missing: Sequence[Run], find: FindEvicted) -> list[EvictedTokens] | None:
    """Return evicted tokens that have all of `missing`, the newest last; None if some are not kept."""
    recent: list[EvictedTokens] = []
    if cache.history is not None:
        recent = [tokens for step in cache.history.since(0) if (tokens := evicted_by(step)) is not None]
    if not _left(missing, recent):
        return recent
    kept = [*find(missing), *recent]
    return None if _left(missing, kept) else kept


def _left(wanted: Sequence[Run], kept: Sequence[EvictedTokens]) -> bool:
    """Return whether some of `wanted` are in none of `kept`."""
    left = {index for first, stop in wanted for index in range(first, stop)}
    for tokens in kept:
        for first, stop in tokens.runs:
            left.difference_update(range(first, stop))
    return bool(left)
