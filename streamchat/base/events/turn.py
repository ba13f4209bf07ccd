"""Events of one turn: its start, progress, figures, and undo."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from streamchat.base.errors import TurnFailure
from streamchat.base.events.cache import CacheState
from streamchat.base.events.event import Event

FinishReason = Literal["stop", "length", "loop", "cancelled", "error"]
"""`stop`: end token or stop string; `length`: max_new_tokens; `loop`: the reply repeated itself; `cancelled`: the user;
`error`: rolled back."""


@dataclass(frozen=True)
class TurnStarted(Event):
    """A user message was accepted; its prefill starts."""

    turn: int
    """Counts from 1."""
    text: str
    prompt_tokens: int
    """Tokens that this turn prefills: only its own."""


@dataclass(frozen=True)
class PrefillProgress(Event):
    """A chunk of the prompt was prefilled."""

    turn: int
    done: int
    total: int


@dataclass(frozen=True)
class TextDelta(Event):
    """More text of the reply; never a partial character or part of a stop string."""

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
    """Since the start of the conversation."""
    tokens_evicted: int
    """Since the start of the conversation."""
    ttft_s: float | None
    """From the start of the turn to the first token of the reply; None without one."""
    decode_tps: float | None
    """Tokens per second after the first one; None with fewer than two."""
    kv_bytes: int
    rss_bytes: int
    vram_bytes: int | None
    """Device memory allocated by torch; None on a CPU."""
    finish_reason: FinishReason
    recalled: tuple[int, ...] = ()
    """Evicted turns that were recalled for this turn."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of a `--stats-json` line."""
        return {**asdict(self), "recalled": list(self.recalled)}


@dataclass(frozen=True)
class TurnFinished(Event):
    """The turn ended; cache, token log and transcript agree.

    With `finish_reason` 'error', or 'cancelled' and an empty `reply`, the turn was rolled back: it is not part of the
    conversation, and `text` is the user's message.
    """

    stats: TurnStats
    finish_reason: FinishReason
    reply: str
    """The whole reply, equal to the joined `TextDelta` texts of this turn."""
    text: str = ""
    rolled_back: bool = False
    message: str = ""
    """If 'error': one sentence for the user."""
    failure: TurnFailure = ""
    """If 'error': why the turn failed."""


@dataclass(frozen=True)
class TurnUndone(Event):
    """The newest turn was undone."""

    turn: int
    text: str
    reply: str
    cache: CacheState
    restored: int = 0
    """Tokens that the turn had evicted and that are cached again."""
    prefilled: int = 0
    """Tokens that were prefilled again."""
    seconds: float = 0.0
    replaced: bool = False
    """A new attempt follows immediately."""
    to_edit: bool = False
    """The message goes back to the input, for editing."""


@dataclass(frozen=True)
class ConversationRewound(Event):
    """All turns after turn `turn` were undone; a `TurnUndone` for each precedes this event."""

    turn: int
    """The newest turn now."""
    undone: int
    """Number of turns that were undone."""
    kept_as: str
    """Id of the fork that keeps them; '' if there is none."""
    is_exact: bool
    """Whether the cache equals the cache after that turn, to the bit."""
    restored: int
    """Tokens that had been evicted since and are cached again."""
    prefilled: int
    """Tokens that were prefilled again."""
    seconds: float
    """Total time, including the creation of the fork."""
    cache: CacheState
