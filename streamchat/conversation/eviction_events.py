"""Finds clean cuts for an eviction, and builds its event."""

from __future__ import annotations

from typing import Any

from streamchat.base import events as ev
from streamchat.cache.eviction.options import Eviction
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.log import TokenLog, TurnRecord


def clean_cut(index: int, log: TokenLog, tokenizer: Any) -> int:
    """Return the first log index at or after `index` that is not inside a character or a message's opening."""
    for turn in log.turns_touching(index, index + 1):
        if turn.start < index < turn.message_start:
            index = turn.message_start
    stop = min(len(log), index + 4)  # a UTF-8 character has at most 4 bytes
    while index < stop and _continues_character(log.ids[index], tokenizer):
        index += 1
    return index


def _continues_character(token: int, tokenizer: Any) -> bool:
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text.startswith("\N{REPLACEMENT CHARACTER}")


def eviction_event(eviction: Eviction, log: TokenLog, cache: StreamingCache, state: ev.CacheState) -> ev.TokensEvicted:
    """Return the event of an eviction, with the turns that it affects."""
    lost = {turn.number: turn for run in eviction.dropped for turn in log.turns_touching(*run)}
    gone = tuple(turn.number for turn in lost.values() if turn.end is not None and not _is_cached(turn, cache))
    return ev.TokensEvicted(
        count=eviction.count,
        token_range=(eviction.dropped[0][0], eviction.dropped[-1][1]),
        turns=tuple(lost),
        turns_gone=gone,
        cache_len_before=eviction.length_before,
        cache_len_after=eviction.length_after,
        trigger=eviction.trigger,
        runs=eviction.dropped,
        cache=state,
    )


def _is_cached(turn: TurnRecord, cache: StreamingCache) -> bool:
    """Return whether any token of the turn is cached, apart from sinks."""
    assert turn.end is not None
    return cache.ledger.count_in(max(turn.start, cache.num_sink_tokens), turn.end) > 0
