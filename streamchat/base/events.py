"""What the engine says: one stream of small frozen dataclasses, in the order in which things happen.

Every face (app, prompt, pipe, replay, log) consumes this stream and has no loop of its own. Importing this module
loads no torch. Sizes are in tokens, times in seconds, memory in bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: end token or stop string; `length`: max_new_tokens; `cancelled`: the user; `error`: rolled back."""

Trigger = Literal["between_turns", "prefill", "decode"]
"""When tokens were evicted: making room before a turn, while a prompt is read, while a reply is written."""


@dataclass(frozen=True)
class Event:
    """Base of all events."""


# --- the model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelLoading(Event):
    """Progress of fetching, converting or loading the model."""

    stage: str
    """What is being done, in words: 'Fetching SmolLM2-135M-Instruct'."""
    done: int = 0
    """Bytes (or steps) done."""
    total: int = 0
    """Bytes (or steps) in all; 0 = not known."""
    unit: Literal["bytes", ""] = ""


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded, for status displays."""

    name: str
    """As the user would type it or know it: 'SmolLM2-135M-Instruct', 'pythia-410m', a folder."""
    source: str
    """Where it was read from: a folder, a file or a Hub id."""
    device: str
    dtype: str
    parameters: int
    """Number of weights."""
    weight_bytes: int
    context_length: int
    """`max_position_embeddings`: what the model was trained to address."""
    cache_size: int
    num_sink_tokens: int
    pinned_tokens: int
    """Tokens of the system prompt beyond the sinks."""
    attention: str
    chat_format: str
    """'template' or 'plain'."""
    template_prompt: str = ""
    """What the chat template says and pins by itself when no system prompt is set."""
    weights: str = "native"
    """'native', or how new tokens are computed: with packed 'int8' or 'int4' weights."""

    @property
    def precision(self) -> str:
        """Number format and weights in words: 'bfloat16', 'bfloat16, int4 weights'."""
        return self.dtype if self.weights == "native" else f"{self.dtype}, {self.weights} weights"


@dataclass(frozen=True)
class ModelReady(Event):
    """The model answers from now on."""

    info: ModelInfo
    load_s: float


@dataclass(frozen=True)
class EngineFailed(Event):
    """The engine cannot go on (or never started). Nothing follows but `EngineClosed`."""

    title: str
    message: str
    """One sentence for the user."""
    exit_code: int
    details: str = ""
    """The traceback for a log file; never for the screen."""


@dataclass(frozen=True)
class EngineClosed(Event):
    """The last event of every engine."""


# --- a turn ---------------------------------------------------------------------------------------------------


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


# --- around turns ---------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know, in one sentence."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True)
class ConversationCleared(Event):
    """The cache and transcript are empty again but for the system prompt; model and settings are kept."""

    system_prompt: str = ""
    pinned_tokens: int = 0


@dataclass(frozen=True)
class TurnPinned(Event):
    """A turn was pinned: it stays in the cache until it is unpinned. Or it was unpinned, with `pinned` False."""

    turn: int
    pinned: bool
    tokens: int
    """How many tokens of it the cache holds."""
    cache: CacheState


# --- saved conversations --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SessionOpened(Event):
    """What is said from now on is saved under this id."""

    session: str


@dataclass(frozen=True)
class SavingChanged(Event):
    """Saving fails from now on, or succeeds again with all that was said meanwhile."""

    works: bool


@dataclass(frozen=True)
class SavedTurn:
    """A turn of a conversation that is resumed."""

    number: int
    text: str
    reply: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float | None = None
    decode_tps: float | None = None
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True)
class ConversationResumed(Event):
    """A saved conversation takes the place of the running one."""

    session: str
    title: str
    turns: tuple[SavedTurn, ...]
    cache: CacheState
    info: ModelInfo
    system_prompt: str
    seconds: float
    """From the opened store to a cache that can go on."""
    read_again: int = 0
    """Tokens that had to be read again; 0 where the saved cache was used."""
    message_back: str = ""
    """A message whose reply had not begun when the program ended; it is the user's again."""


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


@dataclass(frozen=True)
class SummaryReady(Event):
    """What the model says about the turns that would leave next. Nothing was kept of it yet."""

    text: str
    turns: tuple[int, int]
    """First and last turn that it is about."""


@dataclass(frozen=True)
class TextCounted(Event):
    """A text was measured with the model's tokenizer."""

    text: str
    tokens: int


@dataclass(frozen=True)
class SettingChanged(Event):
    """`/set` took effect; the next turn uses it."""

    name: str
    value: Any
