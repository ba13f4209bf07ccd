"""The live status panel: cache and context map, speed, memory, totals and model. Needs only a `StatusBoard`."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Sparkline, Static

from streamchat.base.events import ModelInfo, PrefillProgress
from streamchat.base.sanitize import one_line
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import Row, status_table
from streamchat.tui.widgets.context_map import ContextMap
from streamchat.tui.widgets.figures import Figures
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

    def show(self, board: StatusBoard, prefill: PrefillProgress | None = None) -> None:
        """Update all figures; `prefill` is the progress of a running prefill."""
        loaded, table = board.info is not None, status_table(board, prefill)
        for name in ("#map", "#map-words", "#legend", "#evicted"):
            self.query_one(name).display = loaded
        if len(board.lengths.values) > 1:
            table["evicted"].append(Row("length over time", ""))
        for name, rows in table.items():
            self.query_one(f"#{name}", Figures).show(rows)
        if loaded:
            self.query_one(ContextMap).cache = board.cache
        self._draw("#lengths", board.lengths.values)
        self._draw("#speeds", board.speeds.values)
        self._show_model_name(board.info)

    def figures(self, section: str) -> dict[str, str]:
        """Label -> value of one group ('cache', 'evicted', 'speed', 'memory', 'totals', 'model')."""
        return self.query_one(f"#{section}", Figures).figures

    def on_context_map_chosen(self, message: ContextMap.Chosen) -> None:
        """Describe the selected segment."""
        message.stop()
        self.query_one("#map-words", Static).update(message.description)

    def _draw(self, name: str, values: list[float]) -> None:
        chart = self.query_one(name, Sparkline)
        chart.display = len(values) > 1
        if chart.data != values:
            chart.data = list(values)

    def _show_model_name(self, info: ModelInfo | None) -> None:
        shown = self.query_one("#model-name", Static)
        if info is not None and shown.content != one_line(info.name):  # an update lays out the whole screen
            shown.update(one_line(info.name))
