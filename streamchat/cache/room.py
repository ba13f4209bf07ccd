"""Sizes derived from the cache budget and the room that retained tokens leave in it."""

from __future__ import annotations


def budget_from_ratio(context: int, ratio: float, num_sink_tokens: int) -> int:
    """Return the cache budget for a compression ratio of a context length: room for the sinks and 10 tokens, at least.

    Args:
        context: The model's context length in tokens.
        ratio: Share of the context that the cache does not hold, 0 to below 1.
        num_sink_tokens: Sinks within the budget.
    """
    return max(num_sink_tokens + 10, int(context * (1 - ratio)))


def quarter_of_room(cache_size: int, num_retained: int, most: int) -> int:
    """Return a quarter of the room next to the retained tokens; from 1 to `most` tokens.

    The chunk size for a text that is longer than the cache: each chunk still attends to much of the text before it.
    """
    return min(most, max(1, (cache_size - num_retained) // 4))
