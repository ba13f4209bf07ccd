"""Events of the whole conversation: notices, settings, clearing, saving and resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamchat.base.events.cache import CacheState
from streamchat.base.events.event import Event
from streamchat.base.events.model import ModelInfo
from streamchat.base.events.turn import FinishReason
from streamchat.base.requests import SettingValue


@dataclass(frozen=True)
class Notice(Event):
    """One sentence for the user."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True)
class SettingChanged(Event):
    """`/set` changed a setting; the next turn uses it."""

    name: str
    value: SettingValue


@dataclass(frozen=True)
class ConversationCleared(Event):
    """Cache and transcript were cleared, except the system prompt. Model and settings are kept."""

    system_prompt: str = ""
    pinned_tokens: int = 0


@dataclass(frozen=True)
class SummaryReady(Event):
    """The model summarized the turns that would be evicted next. The summary is not in the conversation yet."""

    text: str
    turns: tuple[int, int]
    """First and last summarized turn."""


@dataclass(frozen=True)
class TextCounted(Event):
    """The tokens of a text were counted with the model's tokenizer."""

    text: str
    tokens: int


@dataclass(frozen=True)
class SessionOpened(Event):
    """The conversation is saved under this session id from now on."""

    session: str


@dataclass(frozen=True)
class SavingChanged(Event):
    """Saving started to fail (`works` is False), or works again and has caught up."""

    works: bool


@dataclass(frozen=True)
class SavedTurn:
    """A turn of a resumed session."""

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
    """A saved session replaced the running conversation."""

    session: str
    title: str
    turns: tuple[SavedTurn, ...]
    cache: CacheState
    info: ModelInfo
    system_prompt: str
    seconds: float
    """From the opened store to a usable cache."""
    prefilled: int = 0
    """Tokens that had to be prefilled again; 0 if the saved cache was used."""
    restored_message: str = ""
    """A message without a reply when the program ended; it goes back to the input."""
    parent: str = ""
    """If the session is a fork, the session that it was forked from."""
    parent_turn: int = 0
    """The last turn that both have; 0 if it is not a fork."""
