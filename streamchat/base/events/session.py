"""The conversation as a whole: notices, settings, clearing, saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from streamchat.base.events.cache import CacheState
from streamchat.base.events.event import Event
from streamchat.base.events.model import ModelInfo
from streamchat.base.events.turn import FinishReason


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know, in one sentence."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True)
class SettingChanged(Event):
    """`/set` took effect; the next turn uses it."""

    name: str
    value: Any


@dataclass(frozen=True)
class ConversationCleared(Event):
    """The cache and transcript are empty again but for the system prompt; model and settings are kept."""

    system_prompt: str = ""
    pinned_tokens: int = 0


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
