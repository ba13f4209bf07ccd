"""The status in one line, for narrow terminals."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

from streamchat.base.events import PrefillProgress
from streamchat.base.formatting import human_bytes, plural
from streamchat.frontend.status import StatusBoard
from streamchat.tui.widgets.gauge import Gauge


class StatusLine(Horizontal):
    """Cache gauge, compressions, memory, tok/s."""

    def compose(self) -> ComposeResult:
        """The gauge and its text."""
        yield Gauge(id="line-gauge")
        yield Static("", id="line-text", markup=False)

    def show(self, board: StatusBoard, reading: PrefillProgress | None = None) -> None:
        """Update the line."""
        cache, memory = board.cache, board.memory
        self.query_one(Gauge).show(cache)
        parts = [f"{cache.length:,}/{cache.cache_size:,} cached", plural(cache.compressions, "compression")]
        if memory is not None and memory.allocated_bytes is not None:
            parts.append(f"VRAM {human_bytes(memory.allocated_bytes)}")
        elif memory is not None:
            parts.append(f"RAM {human_bytes(memory.rss_bytes)}")
        if reading is not None and reading.done < reading.total:
            parts.append(f"prefill {reading.done:,}/{reading.total:,}")
        elif board.decode_tps is not None:
            parts.append(f"{board.decode_tps:.1f} tok/s")
        text = " · ".join(parts) if board.info is not None else "the model is loading"
        self.query_one("#line-text", Static).update(Content(text), layout=False)  # always one line

    @property
    def text(self) -> str:
        """The text next to the gauge."""
        return str(self.query_one("#line-text", Static).content)
