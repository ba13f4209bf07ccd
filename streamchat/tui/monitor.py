"""`streamchat monitor`: a read-only status panel for a chat or a replay in another process."""

from __future__ import annotations

import time
from typing import ClassVar

from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.driver import Driver
from textual.widgets import DataTable

from streamchat.base.errors import ExitCode, StoreError
from streamchat.base.formatting import human_when
from streamchat.base.sanitize import one_line
from streamchat.frontend.watch import MonitoredSession, Watcher, monitored_sessions
from streamchat.tui.terminal import guarded_driver
from streamchat.tui.widgets.key_hints import KeyHints
from streamchat.tui.widgets.status_line import StatusLine
from streamchat.tui.widgets.status_panel import StatusPanel
from streamchat.tui.widgets.text import Verbatim

POLL_S = 1.0
LIST_S = 5.0
SILENT_S = 60.0
"""A running conversation without an update for this long is shown with the time since the last one."""
WIDE, MIN_WIDTH = 80, 60
"""Minimum columns to show the panel by default, and at all."""


class MonitorApp(App[int]):
    """All conversations on the left, the figures of the selected one on the right.

    Args:
        first: The conversation selected at the start.
    """

    TITLE = "streamchat monitor"
    CSS_PATH: ClassVar[list[str]] = ["screens/figures.tcss", "monitor.tcss"]  # type: ignore[assignment]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+q,ctrl+c", "leave", "Quit", priority=True),
        Binding("r", "refresh_list", "Refresh"),
        Binding("b,ctrl+b", "toggle_panel", "Panel"),
    ]

    def __init__(self, first: MonitoredSession, theme: str = "textual-dark") -> None:
        super().__init__()
        self._watcher = Watcher(first)
        self._rows: list[MonitoredSession] = []
        self._wanted_theme = theme
        self._panel_wanted: bool | None = None
        """The user's choice; None = depends on the width."""

    def get_driver_class(self) -> type[Driver]:
        """Textual's driver, with safe suspension (see `keyboard`)."""
        return guarded_driver(super().get_driver_class())

    def compose(self) -> ComposeResult:
        """Selected conversation and list, status panel, status line for narrow terminals."""
        with Horizontal(id="body"):
            with Vertical(id="watched"):
                yield Verbatim("", id="title")
                yield Verbatim("", id="state")
                yield Verbatim("", id="alerts")
                yield DataTable(id="all", cursor_type="row", zebra_stripes=True)
            yield StatusPanel(id="sidebar")
        yield StatusLine(id="status-line")
        yield KeyHints()

    def on_mount(self) -> None:
        """Update now and then every second."""
        if self._wanted_theme in self.available_themes:
            self.theme = self._wanted_theme
        table = self.query_one(DataTable)
        for name in ("state", "turns", "last", "compr.", "title"):
            table.add_column(name, key=name)
        table.focus()
        self._list()
        self._poll()
        self.set_interval(POLL_S, self._poll)
        self.set_interval(LIST_S, self._list)

    def on_resize(self, event: events.Resize) -> None:
        """Replace the panel by a status line if the terminal is narrow."""
        self._arrange(event.size.width)

    def action_toggle_panel(self) -> None:
        """Switch between the panel and the status line."""
        if self.size.width < MIN_WIDTH:
            self.notify(f"the panel needs a terminal with at least {MIN_WIDTH} columns", severity="warning")
            return
        self._panel_wanted = not self.query_one(StatusPanel).display
        self._arrange(self.size.width)

    def _arrange(self, width: int) -> None:
        wanted = width >= WIDE if self._panel_wanted is None else self._panel_wanted
        panel = wanted and width >= MIN_WIDTH
        self.set_class(not panel, "-narrow")
        self.query_one(StatusLine).display = not panel

    def _list(self) -> None:
        """Refresh the list; the selected row stays selected."""
        table = self.query_one(DataTable)
        chosen = self._watcher.session.name
        self._rows = monitored_sessions()
        now = time.time()
        table.clear()
        for each in self._rows:
            kind = "replay" if each.run is not None else "chat"
            state = f"● {kind}" if each.running else f"  {kind}"
            info = each.info
            row = (state, f"{info.turns:,}", human_when(info.updated, now), f"{info.compressions:,}")
            table.add_row(*row, one_line(info.title), key=each.name)
        names = [each.name for each in self._rows]
        if chosen in names:
            table.move_cursor(row=names.index(chosen))

    @on(DataTable.RowSelected)
    def _chosen(self, message: DataTable.RowSelected) -> None:
        message.stop()
        # by name: the list may have changed since
        chosen = next((each for each in self._rows if each.name == message.row_key.value), None)
        if chosen is not None:
            self._watcher = Watcher(chosen)
            self._poll()

    def _poll(self) -> None:
        watcher = self._watcher
        try:
            watcher.poll()
        except StoreError as error:
            self.query_one("#state", Verbatim).show(one_line(str(error)))
            return
        self.query_one("#title", Verbatim).show(one_line(f"{watcher.session.info.title} ({watcher.session.name})"))
        self.query_one("#state", Verbatim).show(self._state(watcher))
        alerts = self.query_one("#alerts", Verbatim)
        alerts.display = bool(watcher.violations)
        alerts.show("\n".join(f"violated: {one_line(each)}" for each in watcher.violations))
        self.query_one(StatusPanel).show(watcher.board)
        self.query_one(StatusLine).show(watcher.board)

    def _state(self, watcher: Watcher) -> str:
        info = watcher.session.info
        since = f"started {human_when(info.created, time.time())}"
        if not watcher.session.running:
            return f"not running · {since} · {info.turns:,} turns"
        if watcher.sampled_at is None:
            return f"running · {since} · no figures yet"
        silent = time.time() - watcher.sampled_at
        if silent > SILENT_S:
            return f"running · {since} · no update for {silent:.0f} s"
        return f"{'generating' if watcher.board.busy else 'waiting for a message'} · {since}"

    def action_refresh_list(self) -> None:
        """Refresh the list and the figures."""
        self._list()
        self._poll()

    def action_leave(self) -> None:
        """Quit."""
        self.exit(ExitCode.OK)


def run_monitor(first: MonitoredSession, theme: str) -> int:
    """Run the monitor until the user quits and return the exit code."""
    app = MonitorApp(first, theme)
    code = app.run()
    return ExitCode.FAILURE if code is None else code
