"""A foldable section of the status panel."""

from __future__ import annotations

from textual import events
from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Static


class _Title(Static):
    def on_click(self, event: events.Click) -> None:
        event.stop()
        assert isinstance(self.parent, Section)
        self.parent.fold(not self.parent.folded)


class Section(Vertical):
    """A title above some widgets; a click on the title folds them.

    Args:
        title: The title.
    """

    def __init__(self, title: str, *children: Widget, id: str | None = None) -> None:  # noqa: A002 - Textual's word
        self.title = title
        super().__init__(_Title(f"▾ {title}", classes="section", markup=False), *children, id=id)

    @property
    def folded(self) -> bool:
        """Whether only the title is shown."""
        return self.has_class("-folded")

    def fold(self, folded: bool) -> None:
        """Fold or unfold the section."""
        self.set_class(folded, "-folded")
        self.query_one(_Title).update(f"{'▸' if folded else '▾'} {self.title}")
