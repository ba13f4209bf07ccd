"""The running figures of a chat, folded from its events: one place for toolbar, sidebar and `/stats`."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamchat.chat import events as ev


@dataclass
class StatusBoard:
    """Latest figures; `apply` every event of one engine in order."""

    info: ev.ModelInfo | None = None
    cache: ev.CacheState = field(default_factory=ev.CacheState)
    memory: ev.MemoryState | None = None
    ttft_s: float | None = None
    decode_tps: float | None = None
    busy: bool = False
    turns: int = 0
    """Turns that became part of the conversation."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    load_s: float = 0.0

    def apply(self, event: ev.Event) -> None:
        """Update the figures that `event` changes."""
        match event:
            case ev.ModelReady(info=info, load_s=load_s):
                self.info, self.load_s = info, load_s
            case ev.StatusSampled():
                self.cache, self.memory, self.busy = event.cache, event.memory, event.busy
                self.ttft_s, self.decode_tps = event.ttft_s, event.decode_tps
            case ev.TokensEvicted(cache=cache):
                self.cache = cache
            case ev.TurnStarted():
                self.busy = True
                self.ttft_s = self.decode_tps = None
            case ev.TurnFinished(stats=stats):
                self.busy = False
                self.ttft_s, self.decode_tps = stats.ttft_s, stats.decode_tps
                if not event.rolled_back:
                    self.turns = stats.turn
                    self.prompt_tokens += stats.prompt_tokens
                    self.new_tokens += stats.new_tokens
            case ev.ConversationCleared():
                self.turns = self.prompt_tokens = self.new_tokens = 0
                self.ttft_s = self.decode_tps = None
            case _:
                pass


def human_bytes(count: float) -> str:
    """Bytes in the unit that reads best: 46.1 MB (powers of 1,000, as file and network tools show them)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_seconds(seconds: float) -> str:
    """A short duration: 45 ms, 1.3 s, 4 min 05 s."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def memory_figures(memory: ev.MemoryState | None) -> list[tuple[str, str]]:
    """(label, value) rows; the label says which number it is: device memory, or process memory on a CPU."""
    if memory is None:
        return [("memory", "n/a")]
    rows: list[tuple[str, str]] = []
    if memory.allocated_bytes is not None:
        rows.append(("VRAM allocated", human_bytes(memory.allocated_bytes)))
        if memory.reserved_bytes is not None:
            rows.append(("VRAM reserved", human_bytes(memory.reserved_bytes)))
        if memory.total_bytes is not None:
            rows.append(("VRAM of device", human_bytes(memory.total_bytes)))
    else:
        rows.append(("VRAM", "n/a (on CPU)"))
    rows.append(("process memory", human_bytes(memory.rss_bytes)))
    return rows


def eviction_sentence(event: ev.TokensEvicted) -> str:
    """The line in the chat at the moment something is forgotten."""
    tokens = f"{event.count} token{'s' if event.count != 1 else ''}"
    partly = [turn for turn in event.turns if turn not in event.turns_gone]
    parts = []
    if event.turns_gone:
        verb = "is" if len(event.turns_gone) == 1 else "are"
        parts.append(f"{turn_words(event.turns_gone)} {verb} no longer seen by the model")
    if partly:
        parts.append(f"{turn_words(partly)} {'is' if len(partly) == 1 else 'are'} now seen only in part")
    what = "; ".join(parts) if parts else "older text is no longer seen by the model"
    return f"{what} ({tokens} left the cache, {event.cache_len_after} of {event.cache.cache_size or '?'} stay)"


def turn_words(turns: tuple[int, ...] | list[int]) -> str:
    """(1, 2, 3) -> 'turns 1-3', (4,) -> 'turn 4', (1, 2, 5) -> 'turns 1-2, 5'."""
    runs: list[list[int]] = []
    for turn in sorted(turns):
        if runs and turn == runs[-1][1] + 1:
            runs[-1][1] = turn
        else:
            runs.append([turn, turn])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"turn{'s' if len(turns) > 1 else ''} {words}"
