"""Progress of downloading and loading the model, shown in the conversation."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import ProgressBar

from streamchat.base.events import ModelLoading
from streamchat.base.formatting import human_bytes
from streamchat.base.sanitize import one_line
from streamchat.tui.widgets.text import Verbatim


class LoadingPanel(Vertical):
    """The stage, a progress bar, and bytes if they are known."""

    def compose(self) -> ComposeResult:
        """Stage, bar and hint."""
        yield Verbatim("Starting", classes="stage")
        yield ProgressBar(show_percentage=False, show_eta=False)
        yield Verbatim("you can type already; your message is sent when the model is ready", classes="hint")

    def show(self, event: ModelLoading) -> None:
        """Update stage and progress."""
        stage = one_line(event.stage)
        if event.total and event.unit == "bytes":
            stage += f"  {human_bytes(event.done)} of {human_bytes(event.total)}"
        elif event.total:
            stage += f"  {event.done:,} of {event.total:,}"
        elif event.done:
            stage += f"  {human_bytes(event.done) if event.unit == 'bytes' else f'{event.done:,}'}"
        self.query_one(".stage", Verbatim).show(stage)
        self.query_one(ProgressBar).update(total=event.total or None, progress=min(event.done, event.total or 0))

    @property
    def text(self) -> str:
        """The stage as shown."""
        return self.query_one(".stage", Verbatim).text
