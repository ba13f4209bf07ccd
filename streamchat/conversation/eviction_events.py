"""Where the window may begin, and what is told when tokens leave."""

from __future__ import annotations

from typing import Any

from streamchat.base import events as ev
from streamchat.cache.streaming import Eviction, StreamingCache
from streamchat.conversation.log import TokenLog, TurnRecord


def clean_cut(index: int, log: TokenLog, tokenizer: Any) -> int:
    """The next place from log index `index` on that is not inside a character or a message's opening."""
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


def told(eviction: Eviction, log: TokenLog, cache: StreamingCache, state: ev.CacheState) -> ev.TokensEvicted:
    """What an eviction means for turns."""
    lost = {turn.number: turn for run in eviction.dropped for turn in log.turns_touching(*run)}
    gone = tuple(turn.number for turn in lost.values() if turn.end is not None and not _still_seen(turn, cache))
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


def _still_seen(turn: TurnRecord, cache: StreamingCache) -> bool:
    """Whether more of it is held than sinks, which say nothing."""
    assert turn.end is not None
    return cache.ledger.count_in(max(turn.start, cache.num_sink_tokens), turn.end) > 0
