"""One turn, from the accepted message to its figures, and its undoing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from streamchat.base.events.cache import CacheState
from streamchat.base.events.event import Event

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: end token or stop string; `length`: max_new_tokens; `cancelled`: the user; `error`: rolled back."""


@dataclass(frozen=True)
class TurnStarted(Event):
    """A user message was accepted and is being read."""

    turn: int
    """Counts from 1."""
    text: str
    prompt_tokens: int
    """Tokens that this turn feeds: only its own."""


@dataclass(frozen=True)
class PrefillProgress(Event):
    """A chunk of the prompt was read."""

    turn: int
    done: int
    total: int


@dataclass(frozen=True)
class TextDelta(Event):
    """More text of the reply; never a broken character, never part of a stop string."""

    turn: int
    text: str


@dataclass(frozen=True)
class TurnStats:
    """Figures of one finished turn; the fields of a `--stats-json` line, in this order."""

    turn: int
    prompt_tokens: int
    new_tokens: int
    cache_len: int
    cache_size: int
    compressions: int
    """Since the conversation began."""
    tokens_evicted: int
    """Since the conversation began."""
    ttft_s: float | None
    """From the start of the turn to the first token of the reply; None without one."""
    decode_tps: float | None
    """Tokens a second after the first one; None with fewer than two."""
    kv_bytes: int
    rss_bytes: int
    vram_bytes: int | None
    """Device memory allocated by torch; None on a CPU."""
    finish_reason: FinishReason

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of a `--stats-json` line."""
        return asdict(self)


@dataclass(frozen=True)
class TurnFinished(Event):
    """The turn is over; cache, token log and transcript agree.

    With `finish_reason` 'cancelled' and an empty `reply`, or 'error', the turn was rolled back: it is not part of the
    conversation, and `text` is what the user had typed.
    """

    stats: TurnStats
    finish_reason: FinishReason
    reply: str
    """The whole reply, equal to the joined `TextDelta` texts of this turn."""
    text: str = ""
    rolled_back: bool = False
    message: str = ""
    """For 'error': one sentence for the user."""


@dataclass(frozen=True)
class TurnUndone(Event):
    """The newest turn was taken back, as if it had not been."""

    turn: int
    text: str
    reply: str
    cache: CacheState
    restored: int = 0
    """Tokens that the turn had pushed out and that the model sees again."""
    read_again: int = 0
    """Tokens that had to be read again for that."""
    seconds: float = 0.0
    replaced: bool = False
    """Another try follows at once."""
    to_edit: bool = False
    """The user wants the message back, to change it."""
