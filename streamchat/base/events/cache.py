"""Events and figures of the cache: contents, evictions, pins and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from streamchat.base.events.event import Event

Trigger = Literal["between_turns", "prefill", "decode", "page_in"]
"""When tokens were evicted: making room before a turn, during prefill, during decoding, or for an evicted turn that is
paged in."""


SegmentPart = Literal["sinks", "system", "user", "assistant"]
"""Contents of a run of cache slots: attention sinks, the system block, or one message of a turn."""


@dataclass(frozen=True)
class Segment:
    """The cached part of one message. A message without a segment is evicted completely."""

    part: SegmentPart
    turn: int
    """0 for sinks and the system block."""
    tokens: int
    """Cached tokens. Messages do not count the sinks."""
    total: int
    """Tokens of the whole message, without sinks; `tokens < total` means that only its end is cached, or, if it was
    recalled, only a part of it."""
    pinned: bool = False
    recalled: bool = False
    """Whether it was evicted and recalled for the newest message."""


@dataclass(frozen=True)
class CacheState:
    """State of the cache, read back from its layers. `length == sinks + pinned + window`."""

    length: int = 0
    cache_size: int = 0
    sinks: int = 0
    pinned: int = 0
    window: int = 0
    compressions: int = 0
    """Evictions so far; one eviction counts once for all layers."""
    tokens_evicted: int = 0
    tokens_seen: int = 0
    """Tokens fed so far, evicted ones included."""
    kv_bytes: int = 0
    """Bytes of the allocated key and value buffers."""
    full_kv_bytes: int = 0
    """Bytes that the cache would need without eviction."""
    first_visible_turn: int = 0
    """Oldest turn whose tokens are all cached; 0 = all turns are."""
    segments: tuple[Segment, ...] = ()
    """Contents of the slots, in order; their tokens add up to `length`."""
    recalled: int = 0
    """Tokens of the window that were recalled for the newest message."""


@dataclass(frozen=True)
class TokensEvicted(Event):
    """Tokens were evicted; the model no longer sees them."""

    count: int
    token_range: tuple[int, int]
    """First index in the token log and one past the last."""
    turns: tuple[int, ...]
    """Turns that lost tokens to this eviction."""
    turns_gone: tuple[int, ...]
    """Turns that this eviction removed completely."""
    cache_len_before: int
    cache_len_after: int
    trigger: Trigger
    cache: CacheState = field(default_factory=CacheState)
    runs: tuple[tuple[int, int], ...] = ()
    """All evicted tokens, as ranges like `token_range`, without the pinned tokens in between."""


@dataclass(frozen=True)
class TurnPinned(Event):
    """A turn was pinned, so that it is never evicted, or unpinned (`pinned` is False)."""

    turn: int
    pinned: bool
    tokens: int
    """Its cached tokens."""
    cache: CacheState


@dataclass(frozen=True)
class TurnPagedIn(Event):
    """An evicted turn is cached and pinned again: its keys and values were paged in, without a prefill."""

    turn: int
    tokens: int
    """How many were paged in."""
    seconds: float
    cache: CacheState


@dataclass(frozen=True)
class TurnsRecalled(Event):
    """Evicted turns were recalled for the running turn, without a prefill."""

    turn: int
    """The running turn."""
    turns: tuple[int, ...]
    """The recalled turns, in ascending order, including those that were still cached after an earlier recall."""
    partly: tuple[int, ...]
    """Those of which only a part was recalled, because the rest did not fit."""
    tokens: int
    """Number of tokens that were paged in; 0 if all were still cached after an earlier recall."""
    runs: tuple[tuple[int, int], ...]
    """Ranges of token log indices of these tokens."""
    seconds: float
    """Time to rank the turns and page them in."""
    cache: CacheState


@dataclass(frozen=True)
class RecallSuggested(Event):
    """Evicted turns match the message of the running turn. They stay evicted."""

    turn: int
    """The running turn."""
    turns: tuple[int, ...]
    excerpts: tuple[str, ...]
    """The start of the matching passage of each turn."""


@dataclass(frozen=True)
class MemoryState:
    """Memory of the process and the device. Device figures are None on a CPU."""

    rss_bytes: int
    """Resident memory of this process."""
    device: str = "cpu"
    """`cuda:0,1` for several devices; the figures are then sums."""
    allocated_bytes: int | None = None
    """Device memory in live tensors (torch)."""
    reserved_bytes: int | None = None
    """Device memory reserved by torch's allocator; above `allocated_bytes` without being a leak."""
    total_bytes: int | None = None
    """Total memory of the device."""


@dataclass(frozen=True)
class StatusSampled(Event):
    """Live figures, a few times a second during a turn and once a second otherwise."""

    cache: CacheState
    memory: MemoryState
    ttft_s: float | None = None
    """Time to first token of the running or last turn."""
    decode_tps: float | None = None
    """Tokens per second of the running or last turn."""
    busy: bool = False
    proposed_tokens: int = 0
    """Tokens proposed by speculation in this conversation."""
    accepted_tokens: int = 0
    """Proposed tokens that became part of replies."""
    decode_step: str = ""
    """What computes new tokens now, if that may change after the model is loaded; else '', see `ModelInfo`."""
    decode_reason: str = ""
    """Why a faster step does not run."""
