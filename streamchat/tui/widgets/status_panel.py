"""The live status panel: cache and context map, speed, memory, totals and model. Needs only a `StatusBoard`."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Sparkline, Static

from streamchat.base.events import PrefillProgress
from streamchat.base.formatting import human_bytes, human_seconds
from streamchat.base.sanitize import one_line
from streamchat.frontend.status import StatusBoard, memory_figures
from streamchat.tui.widgets.context_map import ContextMap
from streamchat.tui.widgets.figures import Figure, Figures
from streamchat.tui.widgets.section import Section

LEGEND = (("you", "$primary"), ("reply", "$primary 45%"), ("system", "$success"), ("pinned", "$warning"))
"""Colors of the context map, as in the style sheet."""


class StatusPanel(VerticalScroll, can_focus=False):
    """Shows a `StatusBoard`; call `show` after each change."""

    def compose(self) -> ComposeResult:
        """Five sections, the most frequently updated first."""
        yield Section(
            "Cache",
            Figures(id="cache"),
            ContextMap(id="map"),
            Static("", id="map-words", markup=False),
            Static(
                Content("  ").join(Content.assemble(("■ ", c), (n, "$foreground 60%")) for n, c in LEGEND), id="legend"
            ),
            Figures(id="evicted"),
            Sparkline(id="lengths"),
            id="section-cache",
        )
        yield Section("Speed", Figures(id="speed"), Sparkline(id="speeds"), id="section-speed")
        yield Section("Memory", Figures(id="memory"), id="section-memory")
        yield Section("Conversation", Figures(id="totals"), id="section-totals")
        yield Section(
            "Model", Static("loading", id="model-name", markup=False), Figures(id="model"), id="section-model"
        )

    def on_mount(self) -> None:
        """Clear the description of the map selection."""
        self._describe("")

    @property
    def sections(self) -> list[Section]:
        """All sections, in order."""
        return list(self.query(Section))

    def show(self, board: StatusBoard, reading: PrefillProgress | None = None) -> None:
        """Update all figures; `reading` is the progress of a prefill."""
        self._show_cache(board)
        self._draw("#lengths", board.lengths.values)
        self.query_one("#speed", Figures).show(speed_figures(board, reading))
        self._draw("#speeds", board.speeds.values)
        self.query_one("#memory", Figures).show([Figure(*row) for row in memory_figures(board.memory)])
        self._show_totals(board)
        self._show_model(board)

    def figures(self, section: str) -> dict[str, str]:
        """Label -> value of one group ('cache', 'evicted', 'speed', 'memory', 'totals', 'model')."""
        return self.query_one(f"#{section}", Figures).figures

    def on_context_map_chosen(self, message: ContextMap.Chosen) -> None:
        """Describe the selected segment."""
        message.stop()
        self._describe(message.description)

    def _describe(self, words: str) -> None:
        self.query_one("#map-words", Static).update(words)

    def _draw(self, name: str, values: list[float]) -> None:
        chart = self.query_one(name, Sparkline)
        chart.display = len(values) > 1
        if chart.data != values:
            chart.data = list(values)

    def _show_cache(self, board: StatusBoard) -> None:
        cache, loaded = board.cache, board.info is not None
        for name in ("#map", "#map-words", "#legend", "#evicted"):
            self.query_one(name).display = loaded
        if not loaded:
            self.query_one("#cache", Figures).show([Figure("length", "–", strong=True)])
            return
        share = f" · {100 * cache.length // cache.cache_size} %" if cache.cache_size else ""
        self.query_one("#cache", Figures).show(
            [Figure("length", f"{cache.length:,} / {cache.cache_size:,}{share}", strong=True)]
        )
        self.query_one(ContextMap).show(cache)
        self.query_one("#evicted", Figures).show(
            [
                Figure("compressions", f"{cache.compressions:,}"),
                Figure("tokens evicted", f"{cache.tokens_evicted:,}"),
                Figure("KV cache", human_bytes(cache.kv_bytes)),
                # before the first eviction this is less than the allocation
                *([Figure("without eviction", human_bytes(cache.full_kv_bytes))] if cache.tokens_evicted else []),
                *([Figure("length over time", "")] if len(board.lengths.values) > 1 else []),
            ]
        )

    def _show_totals(self, board: StatusBoard) -> None:
        rows = [
            Figure("turns", f"{board.turns:,}"),
            Figure("prompt tokens", f"{board.prompt_tokens:,}"),
            Figure("generated tokens", f"{board.new_tokens:,}"),
        ]
        if board.uptime_s is not None:
            rows.append(Figure("uptime", duration(board.uptime_s)))
        if board.session is not None:
            rows.append(Figure("saved as", board.session))
        self.query_one("#totals", Figures).show(rows)

    def _show_model(self, board: StatusBoard) -> None:
        info = board.info
        if info is None:
            return
        shown, name = self.query_one("#model-name", Static), one_line(info.name)
        if shown.content != name:  # an update lays out the whole screen
            shown.update(name)
        self.query_one("#model", Figures).show(
            [
                Figure("device", one_line(info.device)),
                Figure("dtype", info.precision),
                Figure("weights in memory", f"{human_count(info.parameters)}, {human_bytes(info.weight_bytes)}"),
                Figure("trained context", f"{info.context_length:,}" if info.context_length else "n/a"),
            ]
        )


def speed_figures(board: StatusBoard, reading: PrefillProgress | None) -> list[Figure]:
    """Tokens per second and time to first token, for the current or last turn."""
    rows = [
        Figure("tok/s", f"{board.decode_tps:.1f}" if board.decode_tps is not None else "–", strong=True),
        Figure("first token", human_seconds(board.ttft_s) if board.ttft_s is not None else "–"),
    ]
    if reading is not None:
        rows.append(Figure("prefill", f"{reading.done:,} / {reading.total:,}"))
    return rows


def duration(seconds: float) -> str:
    """Format a duration: 3725 -> '1 h 02 min'."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02} min"
    return f"{m} min {s:02} s" if minutes else f"{s} s"


def human_count(count: int) -> str:
    """Format a count: 134515008 -> '134.5 M'."""
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
