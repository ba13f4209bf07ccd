"""The completion list above the input."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from textual.content import Content
from textual.widgets.option_list import Option

from streamchat.base.sanitize import one_line
from streamchat.tui.widgets.option_list import Options


class Completions(Options, can_focus=False):
    """Completions for the current line; hidden if there are none. The input forwards keys to it."""

    def __init__(self) -> None:
        super().__init__(id="completions")
        self._offered: list[str] = []
        self.moved = False
        """Whether the user moved the highlight."""
        self.display = False

    @property
    def shown(self) -> bool:
        """Whether the list is shown."""
        return bool(self.display)

    @property
    def lines(self) -> list[str]:
        """All completions that are shown."""
        return self._offered if self.shown else []

    @property
    def chosen(self) -> str:
        """The highlighted completion, as a whole line; '' for none."""
        return self._offered[self.highlighted] if self.shown and self.highlighted is not None else ""

    def offer(self, completions: Sequence[tuple[str, str]]) -> None:
        """Show (whole line, explanation) pairs; hides the list if there are none."""
        self._offered = [line for line, _ in completions]
        self.moved = False
        self.display = bool(completions)
        self.clear_options()
        if not completions:
            return
        # for a path within a sentence, show only the path
        labels = [one_line(line if line.startswith("/") else line[line.rfind("@") :]) for line in self._offered]
        width = max(map(cell_len, labels))
        self.add_options(
            Option(Content.assemble((f"{label:<{width}}", "bold"), "  ", (one_line(note), "$foreground 60%")))
            for label, (_, note) in zip(labels, completions, strict=True)
        )
        self.highlighted = 0

    def hide(self) -> None:
        """Hide the list."""
        self.offer([])

    def move(self, by: int) -> None:
        """Move the highlight, wrapping around at the ends."""
        if self._offered:
            self.moved = True
            self.highlighted = ((self.highlighted or 0) + by) % len(self._offered)
