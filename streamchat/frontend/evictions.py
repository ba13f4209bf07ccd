"""Eviction notices: which turns are no longer in context. Consecutive evictions are merged."""

from __future__ import annotations

from dataclasses import replace

from streamchat.base import events as ev
from streamchat.base.formatting import plural


def merge_evictions(first: ev.TokensEvicted | None, second: ev.TokensEvicted) -> ev.TokensEvicted:
    """Merge two consecutive evictions; a reply that outgrows the window can evict many times."""
    if first is None:
        return second
    return replace(
        second,
        count=first.count + second.count,
        token_range=(first.token_range[0], second.token_range[1]),
        turns=tuple(sorted({*first.turns, *second.turns})),
        turns_gone=tuple(sorted({*first.turns_gone, *second.turns_gone})),
        cache_len_before=first.cache_len_before,
    )


def eviction_sentence(event: ev.TokensEvicted) -> str:
    """The line that the chat shows for an eviction."""
    tokens = plural(event.count, "token")
    partly = [turn for turn in event.turns if turn not in event.turns_gone]
    parts = []
    if event.turns_gone:
        verb = "is" if len(event.turns_gone) == 1 else "are"
        parts.append(f"{format_turns(event.turns_gone)} {verb} no longer in context")
    if partly:
        parts.append(f"{format_turns(partly)} {'is' if len(partly) == 1 else 'are'} now only partly in context")
    what = "; ".join(parts) if parts else "older text is now out of context"
    size = f"{event.cache.cache_size:,}" if event.cache.cache_size else "?"
    return f"{what} ({tokens} evicted, {event.cache_len_after:,} of {size} cached)"


def format_turns(turns: tuple[int, ...] | list[int]) -> str:
    """(1, 2, 3) -> 'turns 1-3', (4,) -> 'turn 4', (1, 2, 5) -> 'turns 1-2, 5'."""
    runs: list[list[int]] = []
    for turn in sorted(turns):
        if runs and turn == runs[-1][1] + 1:
            runs[-1][1] = turn
        else:
            runs.append([turn, turn])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{'turn' if len(turns) == 1 else 'turns'} {words}"
