"""What the cache holds, what was evicted or pinned, and live figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from streamchat.base.events.event import Event

Trigger = Literal["between_turns", "prefill", "decode"]
"""When tokens were evicted: making room before a turn, during prefill, or during decoding."""


Part = Literal["sinks", "system", "user", "assistant"]
"""What a stretch of the cache holds: attention sinks, the system block, or one message of a turn."""


@dataclass(frozen=True)
class Segment:
    """What the cache holds of one message, in slot order. A message without a segment is forgotten."""

    part: Part
    turn: int
    """0 for sinks and system block."""
    tokens: int
    """Held now, sinks not counted for messages."""
    total: int
    """Of the whole message, sinks not counted; `tokens < total` means that the model sees only its end."""
    pinned: bool = False


@dataclass(frozen=True)
class CacheState:
    """What every layer of the cache holds, read back from the layers. `length == sinks + pinned + window`."""

    length: int = 0
    cache_size: int = 0
    sinks: int = 0
    pinned: int = 0
    window: int = 0
    compressions: int = 0
    """Evictions so far; one counts once for all layers."""
    tokens_evicted: int = 0
    tokens_seen: int = 0
    """Tokens ever fed."""
    kv_bytes: int = 0
    """Bytes of the allocated key and value buffers."""
    full_kv_bytes: int = 0
    """Bytes that the cache would need by now had nothing been evicted."""
    first_visible_turn: int = 0
    """Oldest turn of which the model still sees all tokens; 0 = all turns are seen."""
    segments: tuple[Segment, ...] = ()
    """What the slots hold, in order; the tokens add up to `length`."""


@dataclass(frozen=True)
class TokensEvicted(Event):
    """Tokens left the cache; the model no longer sees them."""

    count: int
    token_range: tuple[int, int]
    """First and one past the last index in the token log."""
    turns: tuple[int, ...]
    """Turns that lost tokens with this eviction."""
    turns_gone: tuple[int, ...]
    """Turns of which nothing is left, by this eviction."""
    cache_len_before: int
    cache_len_after: int
    trigger: Trigger
    cache: CacheState = field(default_factory=CacheState)
    runs: tuple[tuple[int, int], ...] = ()
    """All that left, as `token_range`s without what is pinned in between."""


@dataclass(frozen=True)
class TurnPinned(Event):
    """A turn was pinned: it stays in the cache until it is unpinned. Or it was unpinned, with `pinned` False."""

    turn: int
    pinned: bool
    tokens: int
    """How many tokens of it the cache holds."""
    cache: CacheState


@dataclass(frozen=True)
class MemoryState:
    """Memory figures, each named. Device figures are None on a CPU."""

    rss_bytes: int
    """Resident memory of this process."""
    device: str = "cpu"
    """`cuda:0,1` where there are several; the figures are sums then."""
    allocated_bytes: int | None = None
    """Device memory in live tensors (torch)."""
    reserved_bytes: int | None = None
    """Device memory held by torch's allocator; not a leak when above `allocated_bytes`."""
    total_bytes: int | None = None
    """Memory of the device."""


@dataclass(frozen=True)
class StatusSampled(Event):
    """Live figures, a few times a second during a turn and once a second otherwise."""

    cache: CacheState
    memory: MemoryState
    ttft_s: float | None = None
    """Of the running or last turn."""
    decode_tps: float | None = None
    """Of the running or last turn."""
    busy: bool = False
