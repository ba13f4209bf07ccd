"""Current figures of a chat, computed from its events; the toolbar, the sidebar and `/stats` share them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from streamchat.base import events as ev
from streamchat.base.devices import devices_of
from streamchat.base.formatting import human_bytes, plural

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
                self.lengths.add(event.cache.length)
                if event.busy and event.decode_tps is not None:
                    self.speeds.add(event.decode_tps)
            case ev.TokensEvicted(cache=cache) | ev.TurnPinned(cache=cache):
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
                self.session = self.ttft_s = self.decode_tps = None
            case ev.SessionOpened(session=session):
                self.session = session
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


def retained_summary(info: ev.ModelInfo) -> str:
    """`4 sinks, system prompt 17 tokens`: the tokens retained from the start."""
    system = f", system prompt {plural(info.pinned_tokens, 'token')}" if info.pinned_tokens else ""
    return f"{plural(info.num_sink_tokens, 'sink')}{system}"


def cache_summary(cache: ev.CacheState) -> str:
    """`4 sinks, 17 system prompt, 30 pinned, 200 window`; `pinned` counts turns that the user pinned."""
    system = sum(segment.tokens for segment in cache.segments if segment.part == "system")
    parts = [plural(cache.sinks, "sink")]
    if system:
        parts.append(f"{system:,} system prompt")
    if cache.pinned > system:
        parts.append(f"{cache.pinned - system:,} pinned")
    return ", ".join([*parts, f"{cache.window:,} window"])


def memory_figures(memory: ev.MemoryState | None) -> list[tuple[str, str]]:
    """(label, value) rows for VRAM (`n/a` on a CPU) and process memory."""
    if memory is None:
        return [("memory", "n/a")]
    rows: list[tuple[str, str]] = []
    if memory.allocated_bytes is not None:
        rows.append(("VRAM allocated", human_bytes(memory.allocated_bytes)))
        if memory.reserved_bytes is not None:
            rows.append(("VRAM reserved", human_bytes(memory.reserved_bytes)))
        if memory.total_bytes is not None:
            count = len(devices_of(memory.device))
            rows.append(
                (f"VRAM of {count} devices" if count > 1 else "VRAM of device", human_bytes(memory.total_bytes))
            )
    else:
        rows.append(("VRAM", "n/a (on CPU)"))
    rows.append(("process memory", human_bytes(memory.rss_bytes)))
    return rows
