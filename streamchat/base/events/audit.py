"""The event of an audit: the contents of the cache, read back from its tensors, for checks outside the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamchat.base.events.event import Event

AuditMoment = Literal["eviction", "turn", "rollback", "undo", "resume", "page_in", "recall"]
"""What an audit follows."""


@dataclass(frozen=True)
class AuditedTurn:
    """The newest turn in the token log. Positions are log indices."""

    number: int
    start: int
    prompt_end: int | None
    """One past the last token fed before the reply; None if this process did not feed it."""
    end: int | None
    """One past its last token."""
    difference: str = ""
    """How its ids differ from those of the chat template's rendering; '' if they do not."""


@dataclass(frozen=True)
class CacheAudited(Event):
    """The state of cache and token log at one moment. Only an engine that audits emits it.

    It follows the event that it is about, except that it precedes `TurnFinished`.
    """

    after: AuditMoment
    lengths: tuple[int, ...]
    """The actual length of every layer, read from its key tensor."""
    ledger: tuple[tuple[int, int], ...]
    """Cached tokens according to the ledger: runs `[first, stop)` of log indices."""
    next_index: int
    """Log index of the next token according to the ledger."""
    log_tokens: int
    """Tokens in the token log, including evicted ones."""
    cache_size: int
    pins: tuple[tuple[int, int], ...]
    compressions: int
    cache_id: int
    """Identifies the cache and its buffers: a new cache has a new id."""
    kv_bytes: int
    """Bytes of the allocated key and value buffers."""
    ids: tuple[int, ...]
    """Ids of the cached tokens, in order."""
    turn: AuditedTurn | None
    """None without turns."""
