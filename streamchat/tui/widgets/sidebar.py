"""The status panel: model, cache, speed, memory and totals, live."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from streamchat.chat.events import PrefillProgress
from streamchat.chat.status import StatusBoard, memory_figures
from streamchat.chat.text import one_line
from streamchat.tui.widgets.figures import Figure, Figures
from streamchat.tui.widgets.gauge import Gauge, parts_of
from streamchat.units import human_bytes, human_seconds

MARKS = {"sinks": "$warning", "pinned": "$success", "window": "$primary", "free": "$foreground 30%"}
"""Legend colours; chat.tcss gives the gauge the same."""


class Sidebar(VerticalScroll, can_focus=False):
    """Shows a `StatusBoard`; `show` it again whenever it changed."""

    def compose(self) -> ComposeResult:
        """Five sections."""
        yield Static("Model", classes="section")
        yield Static("loading", id="model-name", markup=False)
        yield Figures(id="model")
        yield Static("Cache", classes="section")
        yield Gauge(id="gauge")
        yield Figures(id="legend")
        yield Figures(id="cache", classes="apart")
        yield Static("Speed", classes="section")
        yield Figures(id="speed")
        yield Static("Memory", classes="section")
        yield Figures(id="memory")
        yield Static("Conversation", classes="section")
        yield Figures(id="totals")

    def show(self, board: StatusBoard, reading: PrefillProgress | None = None) -> None:
        """Update all figures; `reading` while a prompt is read."""
        self._show_model(board)
        self._show_cache(board)
        self.query_one("#speed", Figures).show(speed_figures(board, reading))
        self.query_one("#memory", Figures).show([Figure(*row) for row in memory_figures(board.memory)])
        self.query_one("#totals", Figures).show(
            [
                Figure("turns", f"{board.turns:,}"),
                Figure("tokens read", f"{board.prompt_tokens:,}"),
                Figure("tokens written", f"{board.new_tokens:,}"),
            ]
        )

    def figures(self, section: str) -> dict[str, str]:
        """Label -> value of one section ('model', 'legend', 'cache', 'speed', 'memory', 'totals')."""
        return self.query_one(f"#{section}", Figures).figures

    def _show_model(self, board: StatusBoard) -> None:
        info = board.info
        if info is None:
            return
        self.query_one("#model-name", Static).update(one_line(info.name))
        self.query_one("#model", Figures).show(
            [
                Figure("device", one_line(info.device)),
                Figure("dtype", info.dtype),
                Figure("weights", f"{human_count(info.parameters)}, {human_bytes(info.weight_bytes)}"),
                Figure("trained context", f"{info.context_length:,}" if info.context_length else "n/a"),
            ]
        )

    def _show_cache(self, board: StatusBoard) -> None:
        cache = board.cache
        self.query_one(Gauge).show(cache)
        self.query_one("#legend", Figures).show(
            [Figure(part.name, f"{part.tokens:,}", mark=MARKS[part.name]) for part in parts_of(cache)]
        )
        self.query_one("#cache", Figures).show(
            [
                Figure("length / budget", f"{cache.length:,} / {cache.cache_size:,}", strong=True),
                Figure("compressions", f"{cache.compressions:,}"),
                Figure("tokens evicted", f"{cache.tokens_evicted:,}"),
                Figure("KV cache", human_bytes(cache.kv_bytes)),
                Figure("full cache would be", human_bytes(cache.full_kv_bytes)),
            ]
        )


def speed_figures(board: StatusBoard, reading: PrefillProgress | None) -> list[Figure]:
    """Tokens a second and time to first token, of the running or last turn."""
    rows = [
        Figure("tok/s", f"{board.decode_tps:.1f}" if board.decode_tps is not None else "–", strong=True),
        Figure("first token", human_seconds(board.ttft_s) if board.ttft_s is not None else "–"),
    ]
    if reading is not None:
        rows.append(Figure("reading prompt", f"{reading.done:,} / {reading.total:,}"))
    return rows


def human_count(count: int) -> str:
    """134515008 -> '134.5 M'."""
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
