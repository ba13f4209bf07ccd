"""The state of the cache as front ends see it."""

from __future__ import annotations

from streamchat.base.events import CacheState
from streamchat.cache.eviction.policy import Retention
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.log import TokenLog
from streamchat.conversation.segments import segments


def cache_view(cache: StreamingCache, log: TokenLog) -> CacheState:
    """Return the current state of `cache`, read back from its layers; `log` has its tokens and turns."""
    length = max(cache.lengths, default=0)
    sinks = min(length, cache.num_sink_tokens)
    pins = Retention(cache.cache_size, cache.num_sink_tokens, cache.pins)
    pinned = pins.retained_count(cache.ledger) - sinks  # the system block and pinned turns
    first_kept = cache.ledger.index_at(cache.prefix)
    return CacheState(
        length=length,
        cache_size=cache.cache_size,
        sinks=sinks,
        pinned=pinned,
        window=length - sinks - pinned,
        compressions=cache.compression_count,
        tokens_evicted=cache.tokens_evicted,
        tokens_seen=cache.ledger.next_index,
        kv_bytes=cache.kv_bytes,
        full_kv_bytes=cache.token_bytes * cache.ledger.next_index,
        first_visible_turn=log.first_turn_from(first_kept) if cache.tokens_evicted else 0,
        segments=segments(cache.ledger, log, sinks=cache.num_sink_tokens, pins=cache.pins, recalled=cache.recalled),
        recalled=cache.num_retained - sinks - pinned,
    )
