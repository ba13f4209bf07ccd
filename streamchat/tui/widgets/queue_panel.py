"""The queued messages, above the input."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

from streamchat.frontend.outbox import Outbox, Phase
from streamchat.frontend.slash.queue import queue_line
from streamchat.tui.bindings import hint

SHARE, MIN_ROWS = 6, 2
"""The list takes at most one row in `SHARE` of the screen, and may always take `MIN_ROWS`."""


class QueuePanel(Static):
    """A heading with the keys, then a row per message; a long queue shows its ends. Hidden if the queue is empty."""

    def __init__(self) -> None:
        super().__init__(markup=False, id="queue")
        self.display = False
        self.text = ""
        """What is shown."""

    def show(self, outbox: Outbox) -> None:
        """Show the messages in `outbox`."""
        self.display = bool(outbox.queue)
        heading, rows = (self._heading(outbox), "\n".join(self._rows(outbox))) if outbox.queue else ("", "")
        if (text := f"{heading}\n{rows}") != self.text:
            self.text = text
            self.update(Content.assemble(heading, "\n", (rows, "$foreground 80%")))

    def _rows(self, outbox: Outbox) -> list[str]:
        total = len(outbox.queue)
        room = max(MIN_ROWS, self.screen.size.height // SHARE)
        if total <= room:
            return [queue_line(outbox, index) for index in range(total)]
        first = [queue_line(outbox, index) for index in range(room - 2)]
        return [*first, f"     and {total - len(first) - 1} more (/queue lists all)", queue_line(outbox, total - 1)]

    def _heading(self, outbox: Outbox) -> str:
        total, waiting = len(outbox.queue), outbox.waiting
        if outbox.phase is Phase.FAILED:
            return f"{total} not sent: the engine has stopped; they are printed when you quit"
        remove = f"{hint(self.app, 'chat.queue_drop')} removes"
        if outbox.edited is not None:
            send, leave = hint(self.app, "prompt.send"), hint(self.app, "chat.stop")
            return f"editing {outbox.edited + 1} of {total} · {send} saves it · {leave} cancels · {remove}"
        if not waiting:
            return f"{total} held · {hint(self.app, 'prompt.send')} (empty input) sends · Up edits · {remove}"
        until = "the model is ready" if outbox.phase is Phase.LOADING else "this reply is done"
        held = f", {total - waiting} held" if waiting < total else ""
        return f"{waiting} queued until {until}{held} · Up edits · {remove}"
