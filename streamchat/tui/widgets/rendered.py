"""Compares a streamed document with the blocks that the whole text gives."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widget import Widget
from textual.widgets import Label
from textual.widgets._markdown import MarkdownBlock, MarkdownFence, MarkdownTable

from streamchat.tui.widgets.growing import BulletList, OrderedList, list_items, list_rows


def show_same(shown: Sequence[Widget], blocks: Sequence[MarkdownBlock]) -> bool:
    """Return whether the mounted widgets `shown` look like `blocks`, which were just parsed."""
    return len(shown) == len(blocks) and all(
        type(widget) is type(block) and isinstance(widget, MarkdownBlock) and _shows(widget, block)
        for widget, block in zip(shown, blocks, strict=True)
    )


def _shows(widget: MarkdownBlock, block: MarkdownBlock) -> bool:
    if isinstance(block, BulletList | OrderedList):
        rows, items = list_rows(widget), list_items(block)
        return [row.mark for row in rows] == block.marks(items) and all(
            show_same(row.cell.children, item._blocks) for row, item in zip(rows, items, strict=True)
        )
    if isinstance(widget, MarkdownTable) and isinstance(block, MarkdownTable):
        headers, rows_ = block._get_headers_and_rows()
        return _same_cells([widget._headers, *widget._rows], [headers, *rows_])
    if isinstance(block, MarkdownFence):
        code = widget.query_one("#code-content", Label).content  # blank if it changed while it was mounted
        return isinstance(code, Content) and code.is_same(block._highlighted_code)
    return widget._content.is_same(block._content) and show_same(widget.children, block._blocks)


def _same_cells(shown: list[list[Content]], cells: list[list[Content]]) -> bool:
    return [len(row) for row in shown] == [len(row) for row in cells] and all(
        old.is_same(new) for row, other in zip(shown, cells, strict=True) for old, new in zip(row, other, strict=True)
    )
