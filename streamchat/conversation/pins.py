"""Pinning turns: what the user wants the model to keep."""

from __future__ import annotations

from collections.abc import Iterable

from streamchat.base.errors import ConfigError
from streamchat.cache.eviction.policy import Run
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.log import TokenLog, TurnRecord

SMALLEST_WINDOW = 8
"""Fewer tokens than this next to the retained ones are not a window to chat in."""


def is_pinned(turn: TurnRecord, pins: Iterable[Run], num_sink_tokens: int) -> bool:
    """Whether all of `turn` that is not a sink is in `pins`, runs of log indices."""
    stop = turn.end
    return stop is not None and any(a <= max(turn.start, num_sink_tokens) and stop <= b for a, b in pins)


def pinned_turns(log: TokenLog, pins: Iterable[Run], num_sink_tokens: int) -> list[TurnRecord]:
    """The pinned turns of `log`, oldest first. Looks at turns inside the pins only."""
    pins = tuple(pins)
    touched = (turn for run in pins for turn in log.turns_touching(*run))
    return [turn for turn in touched if is_pinned(turn, pins, num_sink_tokens)]


def set_pin(cache: StreamingCache, log: TokenLog, number: int, pinned: bool) -> int:
    """Keep what the cache holds of turn `number` for good, or let it leave again; returns how many tokens that is.

    Raises:
        ConfigError: There is no such turn, nothing of it is held, or pinning it would leave too little room.
    """
    if not 1 <= number <= len(log.turns):
        has = f"the conversation has {len(log.turns)}" if log.turns else "nothing was said yet"
        raise ConfigError(f"there is no turn {number}; {has}")
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
        raise ConfigError(f"turn {number} cannot be pinned: nothing of it is left in the cache")
    if already:
        raise ConfigError(f"turn {number} is pinned already")
    least = max(SMALLEST_WINDOW, cache.cache_size // 4)
    free = cache.cache_size - cache.kept - tokens
    if free < least:
        raise ConfigError(
            f"pinning turn {number} ({tokens} tokens) would leave {max(0, free)} of {cache.cache_size} tokens for "
            f"the conversation, and at least {least} must stay; unpin something or start with a larger --cache-size"
        )
    cache.pin(first, turn.end)
    return tokens
