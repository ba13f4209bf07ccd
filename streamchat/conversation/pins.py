"""Pins turns: tokens that the user wants never to be evicted."""

from __future__ import annotations

from collections.abc import Iterable

from streamchat.base.errors import ConfigError
from streamchat.base.formatting import plural
from streamchat.cache.eviction.policy import Retention, Run, merged_runs
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.log import TokenLog, TurnRecord

SMALLEST_WINDOW = 8
"""Minimum number of unpinned tokens."""


def is_pinned(turn: TurnRecord, pins: Iterable[Run], num_sink_tokens: int) -> bool:
    """Return whether all of `turn` except sinks is in `pins`, runs of log indices."""
    stop = turn.end
    return stop is not None and any(a <= max(turn.start, num_sink_tokens) and stop <= b for a, b in pins)


def pinned_turns(log: TokenLog, pins: Iterable[Run], num_sink_tokens: int) -> list[TurnRecord]:
    """Return the pinned turns of `log`, oldest first. Only turns that touch a pin are checked."""
    pins = tuple(pins)
    touched = (turn for run in pins for turn in log.turns_touching(*run))
    return [turn for turn in touched if is_pinned(turn, pins, num_sink_tokens)]


def set_pin(cache: StreamingCache, log: TokenLog, number: int, pinned: bool) -> int:
    """Pin the cached tokens of turn `number`, or unpin them; return how many they are.

    Raises:
        ConfigError: The turn does not exist or is not cached, or pinning it would leave too little room.
    """
    if not 1 <= number <= len(log.turns):
        has = f"the conversation has {len(log.turns)}" if log.turns else "the conversation is empty"
        raise ConfigError(f"turn {number} does not exist; {has}")
    turn = log.turns[number - 1]
    assert turn.end is not None
    first = max(turn.start, cache.num_sink_tokens)
    tokens = cache.ledger.count_in(first, turn.end)
    already = is_pinned(turn, cache.pins, cache.num_sink_tokens)
    if not pinned:
        if not already:
            raise ConfigError(f"turn {number} is not pinned")
        cache.unpin(first, turn.end)
        return tokens
    if not tokens:
        raise ConfigError(f"turn {number} cannot be pinned: it was evicted from the cache")
    if already:
        raise ConfigError(f"turn {number} is already pinned")
    require_free_window(cache, (first, turn.end), 0, f"pinning turn {number}")
    cache.pin(first, turn.end)
    return tokens


def require_free_window(cache: StreamingCache, run: Run, missing: int, what: str) -> None:
    """Refuse to retain `run` if that would leave too little room for the conversation.

    Args:
        cache: The cache.
        run: The run of log indices to retain.
        missing: How many of its tokens are not cached yet.
        what: What the user wants, for the message: 'pinning turn 3'.

    Raises:
        ConfigError: It would.
    """
    # without recalled tokens, which the next message makes evictable
    before, after = (
        Retention(cache.cache_size, cache.num_sink_tokens, tuple(merged_runs(pins))).retained_count(cache.ledger)
        for pins in (cache.pins, [*cache.pins, run])
    )
    retained, tokens = after + missing, after + missing - before
    least, free = max(SMALLEST_WINDOW, cache.cache_size // 4), cache.cache_size - retained
    if free < least:
        raise ConfigError(
            f"{what} ({tokens} tokens) would leave {max(0, free)} of {cache.cache_size} tokens for the conversation, "
            f"which needs at least {least}; unpin another turn, or restart with a larger --cache-size"
        )


def require_window(cache: StreamingCache, system_tokens: int) -> None:
    """Refuse a system block of `system_tokens` tokens, or sinks, that leave no room for a conversation.

    Raises:
        ConfigError: They leave fewer than `SMALLEST_WINDOW` tokens of the budget.
    """
    sinks, size = cache.num_sink_tokens, cache.cache_size
    retained = max(system_tokens, sinks)
    if size - retained >= SMALLEST_WINDOW:
        return
    if system_tokens > sinks:
        what, cure = f"the system prompt ({plural(system_tokens, 'token')}) leaves", "shorten it"
    else:
        what, cure = f"num_sink_tokens = {sinks} leaves", "lower it"
    raise ConfigError(
        f"{what} {max(0, size - retained)} of cache_size = {size} for the conversation, and it needs "
        f"{SMALLEST_WINDOW}; {cure} or set cache_size to at least {retained + SMALLEST_WINDOW}"
    )
