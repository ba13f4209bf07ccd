"""The queued message: sent while the model was busy."""

from __future__ import annotations

from streamchat.base.sanitize import one_line
from streamchat.tui.bindings import hint
from streamchat.tui.widgets.text import Verbatim


class QueuedMessage(Verbatim):
    """Shown above the input until the message is sent."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002 - Textual's word
        super().__init__(id=id)
        self.display = False

    def offer(self, text: str | None, until: str) -> None:
        """Show that `text` is queued `until` some condition; None hides the widget."""
        self.display = text is not None
        if text is not None:
            first = one_line(text)
            short = first if len(first) <= 60 else f"{first[:59]}…"
            self.show(f"queued {until} ({hint(self.app, 'chat.stop')} recalls it): {short}")
