"""Pinning turns: what the user wants the model to keep."""

from __future__ import annotations

from streamchat.cache.streaming import StreamingCache
from streamchat.chat.log import TokenLog
from streamchat.errors import ConfigError


def set_pin(cache: StreamingCache, log: TokenLog, number: int, pinned: bool, smallest_window: int) -> int:
    """Keep what the cache holds of turn `number` for good, or let it leave again; returns how many tokens that is.

    Raises:
        ConfigError: There is no such turn, nothing of it is held, or pinning it would leave too little room.
    """
    if not 1 <= number <= len(log.turns):
        has = f"the conversation has {len(log.turns)}" if log.turns else "nothing was said yet"
        raise ConfigError(f"there is no turn {number}; {has}")
    turn = log.turns[number - 1]
    assert turn.stop is not None
    first = max(turn.first, cache.num_sink_tokens)
    tokens = cache.ledger.count_in(first, turn.stop)
    is_pinned = any(a <= first and turn.stop <= b for a, b in cache.pins)
    if not pinned:
        if not is_pinned:
            raise ConfigError(f"turn {number} is not pinned")
        cache.unpin(first, turn.stop)
        return tokens
    if not tokens:
        raise ConfigError(f"turn {number} cannot be pinned: nothing of it is left in the cache")
    if is_pinned:
        raise ConfigError(f"turn {number} is pinned already")
    least = max(smallest_window, cache.cache_size // 4)
    free = cache.cache_size - cache.kept - tokens
    if free < least:
        raise ConfigError(
            f"pinning turn {number} ({tokens} tokens) would leave {max(0, free)} of {cache.cache_size} tokens for "
            f"the conversation, and at least {least} must stay; unpin something or start with a larger --cache-size"
        )
    cache.pin(first, turn.stop)
    return tokens
