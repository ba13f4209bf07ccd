"""Current figures of a chat, computed from its events; `status_table` has their labels and formats."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from streamchat.base import events as ev

SERIES_LIMIT = 256


@dataclass
class Series:
    """A time series in bounded memory: when full, it drops every second value and halves the sampling rate."""

    values: list[float] = field(default_factory=list)
    _stride: int = 1
    _skipped: int = 0

    def add(self, value: float) -> None:
        """Append a value, or skip it at a reduced sampling rate."""
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped = 0
        self.values.append(float(value))
        if len(self.values) >= SERIES_LIMIT:
            self.values = self.values[1::2]
            self._stride *= 2


@dataclass
class StatusBoard:
    """Latest figures; `apply` all events of one engine in order."""

    info: ev.ModelInfo | None = None
    cache: ev.CacheState = field(default_factory=ev.CacheState)
    memory: ev.MemoryState | None = None
    ttft_s: float | None = None
    decode_tps: float | None = None
    busy: bool = False
    proposed_tokens: int = 0
    """Tokens proposed by speculation."""
    accepted_tokens: int = 0
    turns: int = 0
    """Turns in the conversation."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    clock: Callable[[], float] = time.monotonic
    """Returns seconds; tests replace it for reproducible screenshots."""
    lengths: Series = field(default_factory=Series)
    """Cache length over time."""
    speeds: Series = field(default_factory=Series)
    """Tokens per second over time, while a reply is generated."""
    session: str | None = None
    """Session id; None before the first turn and if the conversation is not saved."""
    connection: str = ""
    """What is wrong with the connection to a server; '' if nothing is."""
    saving_works: bool = True
    """False while the conversation cannot be written to the database."""
    _ready_at: float | None = None
    _turns: list[tuple[int, int]] = field(default_factory=list)
    """(prompt tokens, generated tokens) per turn."""

    @property
    def uptime_s(self) -> float | None:
        """Seconds since the model was loaded; None before."""
        return None if self._ready_at is None else self.clock() - self._ready_at

    def apply(self, event: ev.Event) -> None:
        """Update the figures for `event`."""
        match event:
            case ev.ModelReady(info=info):
                self.info = info
                self._ready_at = self.clock() if self._ready_at is None else self._ready_at
            case ev.StatusSampled():
                self.cache, self.memory, self.busy = event.cache, event.memory, event.busy
                self.ttft_s, self.decode_tps = event.ttft_s, event.decode_tps
                self.proposed_tokens, self.accepted_tokens = event.proposed_tokens, event.accepted_tokens
                if event.decode_step and self.info is not None:
                    step, reason = event.decode_step, event.decode_reason
                    self.info = replace(self.info, decode_step=step, decode_reason=reason)
                self.lengths.add(event.cache.length)
                if event.busy and event.decode_tps is not None:
                    self.speeds.add(event.decode_tps)
            case ev.TokensEvicted(cache=cache) | ev.TurnPinned(cache=cache) | ev.TurnPagedIn(cache=cache):
                self.cache = cache
            case ev.ConversationRewound(cache=cache) | ev.TurnsRecalled(cache=cache):
                self.cache = cache
            case ev.TurnStarted():
                self.busy = True
                self.ttft_s = self.decode_tps = None
            case ev.TurnFinished(stats=stats):
                self.busy = False
                self.ttft_s, self.decode_tps = stats.ttft_s, stats.decode_tps
                if not event.rolled_back:
                    self._count(stats.prompt_tokens, stats.new_tokens)
            case ev.TurnUndone(cache=cache):
                self.cache = cache
                if self._turns:
                    prompt_tokens, new_tokens = self._turns.pop()
                    self.turns -= 1
                    self.prompt_tokens -= prompt_tokens
                    self.new_tokens -= new_tokens
            case ev.ConversationCleared():
                self._reset_counts()
                self.session = None
            case ev.SessionOpened(session=session):
                self.session = session
            case ev.ConnectionChanged(works=works, reason=reason):
                self.connection = "" if works else f"{reason}; connecting again"
            case ev.SavingChanged(works=works):
                self.saving_works = works
            case ev.ConversationResumed():
                self.info, self.cache = event.info, event.cache
                self._reset_counts()
                for turn in event.turns:
                    self._count(turn.prompt_tokens, turn.new_tokens)
            case _:
                pass

    def _count(self, prompt_tokens: int, new_tokens: int) -> None:
        self._turns.append((prompt_tokens, new_tokens))
        self.turns += 1
        self.prompt_tokens += prompt_tokens
        self.new_tokens += new_tokens

    def _reset_counts(self) -> None:
        self._turns.clear()
        self.turns = self.prompt_tokens = self.new_tokens = 0
        self.proposed_tokens = self.accepted_tokens = 0
        self.ttft_s = self.decode_tps = None
