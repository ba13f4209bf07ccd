"""Many small evictions told as one."""

from __future__ import annotations

from dataclasses import replace

from streamchat.chat import events as ev


def merged(first: ev.TokensEvicted | None, second: ev.TokensEvicted) -> ev.TokensEvicted:
    """Two evictions in a row as one: a reply that outgrows the window evicts a token at a time."""
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
