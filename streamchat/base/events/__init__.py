"""What the engine emits: small frozen dataclasses, in the order in which things happen.

Every front end (app, prompt, pipe, replay, log) consumes this stream and has no loop of its own. Importing this package
loads no torch. Sizes are in tokens, times in seconds, memory in bytes.
"""

# ruff: noqa: F401 - all names are for import from here
# mypy: implicit-reexport

from streamchat.base.events.audit import AuditedTurn, AuditMoment, CacheAudited
from streamchat.base.events.cache import (
    CacheState,
    MemoryState,
    RecallSuggested,
    Segment,
    SegmentPart,
    StatusSampled,
    TokensEvicted,
    Trigger,
    TurnPagedIn,
    TurnPinned,
    TurnsRecalled,
)
from streamchat.base.events.connection import ConnectionChanged
from streamchat.base.events.event import Event
from streamchat.base.events.model import (
    EngineClosed,
    EngineFailed,
    ModelFetched,
    ModelFetching,
    ModelInfo,
    ModelLoading,
    ModelReady,
)
from streamchat.base.events.session import (
    ConversationCleared,
    ConversationResumed,
    Notice,
    SavedTurn,
    SavingChanged,
    SessionOpened,
    SettingChanged,
    SummaryReady,
    TextCounted,
)
from streamchat.base.events.turn import (
    ConversationRewound,
    FinishReason,
    PrefillProgress,
    TextDelta,
    TurnFinished,
    TurnStarted,
    TurnStats,
    TurnUndone,
)
