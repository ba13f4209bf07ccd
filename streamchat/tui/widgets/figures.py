"""Rows with a label on the left and a value on the right."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from textual.content import Content
from textual.visual import VisualType
from textual.widgets import Static

from streamchat.frontend.status_table import Row


class Figures(Static):
    """A list of figures, shown literally. A value that does not fit next to its label goes below it."""

    def __init__(self, *, id: str) -> None:  # noqa: A002 - Textual's word
        super().__init__(markup=False, id=id)
        self._figures: tuple[Row, ...] = ()

    @property
    def figures(self) -> dict[str, str]:
        """Label -> value, as shown."""
        return {figure.label: figure.value for figure in self._figures}

    def show(self, figures: Sequence[Row]) -> None:
        """Replace the rows."""
        rows = tuple(figures)
        if rows != self._figures:
            layout = len(rows) != len(self._figures) or self._wraps(rows) != self._wraps(self._figures)
            self._figures = rows
            self.refresh(layout=layout)

    def render(self) -> VisualType:
        """The rows at the current width."""
        width = max(1, self.content_size.width or 32)
        return Content("\n").join(self._row(figure, width) for figure in self._figures)

    def _wraps(self, figures: Sequence[Row]) -> list[bool]:
        width = self.content_size.width or 32
        return [not self._fits(figure, width) for figure in figures]

    @staticmethod
    def _fits(figure: Row, width: int) -> bool:
        return cell_len(figure.label) + 1 + cell_len(figure.value) <= width

    def _row(self, figure: Row, width: int) -> Content:
        left = Content.assemble((figure.label, "$foreground 60%"))
        value = Content.styled(figure.value, "bold $foreground" if figure.strong else "$foreground")
        gap = width - left.cell_length - value.cell_length
        if gap >= 1:
            return Content.assemble(left, " " * gap, value)
        return Content.assemble(left, "\n", value.right(width) if value.cell_length <= width else value)
