"""Selects the tokens that fit into a smaller cache, for resume and undo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Retention, Run, merged_runs, runs_without
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.log import TokenLog
from streamchat.conversation.pins import SMALLEST_WINDOW, pinned_turns


@dataclass(frozen=True)
class CacheSelection:
    """The tokens to cache."""

    runs: list[Run]
    """Runs of log indices, at most the budget in total."""
    turn_starts: list[int]
    pins: tuple[Run, ...]
    unpinned: tuple[int, ...] = ()
    """Turns whose pins left too little room for a window, and were removed."""


def fit_to_budget(
    cache: StreamingCache,
    log: TokenLog,
    cached: Sequence[Run],
    *,
    pins: Sequence[Run],
    turn_starts: Sequence[int],
    reserve: int = 0,
) -> CacheSelection:
    """Simulate the eviction of the tokens of `cached` that exceed the budget of `cache`, by its policy.

    Sinks, system block and pins are retained. If pins would leave fewer than `SMALLEST_WINDOW` tokens, turns are
    unpinned, oldest first.

    Args:
        cache: Defines the budget and the policy. Not changed.
        log: The conversation, up to the last token that may be cached.
        cached: Runs of log indices.
        pins: Runs of log indices, system block included.
        turn_starts: Log indices where whole turns can be cut.
        reserve: Number of tokens that will follow and must not cause an eviction.
    """
    budget = cache.cache_size - reserve
    pins, unpinned = merged_runs(pins), list[int]()
    for turn in pinned_turns(log, pins, cache.num_sink_tokens):
        if _retained(cache, cached, pins) + SMALLEST_WINDOW <= budget:
            break
        pins = runs_without(pins, turn.start, turn.start if turn.end is None else turn.end)
        unpinned.append(turn.number)
    runs, starts = cache.simulate_eviction(cached, len(log), budget=budget, pins=pins, turn_starts=turn_starts)
    return CacheSelection(runs, starts, tuple(pins), tuple(unpinned))


def half_of(fitted: CacheSelection, cache: StreamingCache, log: TokenLog) -> CacheSelection | None:
    """Return `fitted` without the older half of its evictable tokens; None if there are none."""
    tokens = sum(stop - first for first, stop in fitted.runs)
    budget = max(tokens // 2, _retained(cache, fitted.runs, fitted.pins) + SMALLEST_WINDOW)
    if budget >= tokens:
        return None
    runs, starts = cache.simulate_eviction(
        fitted.runs, len(log), budget=budget, pins=fitted.pins, turn_starts=fitted.turn_starts
    )
    return replace(fitted, runs=runs, turn_starts=starts)


def _retained(cache: StreamingCache, cached: Sequence[Run], pins: Sequence[Run]) -> int:
    return Retention(cache.cache_size, cache.num_sink_tokens, tuple(pins)).retained_count(Ledger(list(cached)))


def unpinned_notice(turns: Sequence[int], cache_size: int) -> str:
    """Return a notice about turns that were unpinned, with the reason."""
    which = f"Turn {turns[0]} is" if len(turns) == 1 else f"Turns {', '.join(map(str, turns))} are"
    return (
        f"{which} no longer pinned: with cache_size = {cache_size}, pinned tokens would leave fewer than "
        f"{SMALLEST_WINDOW} for the conversation."
    )
