"""Progress of downloading and loading the model, shown in the conversation."""

from __future__ import annotations

from textual.containers import Vertical
from textual.widgets import ProgressBar

from streamchat.base.events import ModelLoading
from streamchat.frontend.messages import loading_text
from streamchat.tui.widgets.text import Verbatim


class LoadingPanel(Vertical):
    """The stage, a progress bar, and bytes if they are known."""

    def __init__(self) -> None:
        hint = Verbatim("you can type already; your message is sent when the model is ready", classes="hint")
        bar = ProgressBar(show_percentage=False, show_eta=False)
        super().__init__(Verbatim("Starting", classes="stage"), bar, hint)

    def show(self, event: ModelLoading) -> None:
        """Update stage and progress."""
        self.query_one(".stage", Verbatim).show(loading_text(event))
        self.query_one(ProgressBar).update(total=event.total or None, progress=min(event.done, event.total or 0))

    @property
    def text(self) -> str:
        """The stage as shown."""
        return self.query_one(".stage", Verbatim).text
