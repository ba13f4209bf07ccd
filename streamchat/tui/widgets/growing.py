"""Lists and quotes that grow in place: finished items are neither removed nor laid out again.

Textual updates the last paragraph, code block or table of a streamed document in place, but replaces a whole list for
each new word in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widget import Widget
from textual.widgets._markdown import (
    MarkdownBlock,
    MarkdownBlockQuote,
    MarkdownBullet,
    MarkdownBulletList,
    MarkdownListItem,
    MarkdownOrderedList,
)

from streamchat.tui.widgets.backdrop import Column
from streamchat.tui.widgets.one_layout import OneLayout

if TYPE_CHECKING:
    _Block = MarkdownBlock
else:
    _Block = object  # Textual inherits styles from the first base that is a widget


class Growing(_Block):
    """A mixin, before the Textual class, for a block that can show a longer version of itself."""

    async def grow(self, block: MarkdownBlock) -> bool:
        """Show `block`, of the same class, in place; return False, with nothing changed, if that is not possible."""
        raise NotImplementedError

    async def _update_from_block(self, block: MarkdownBlock) -> None:
        """Show `block`, the same part of the document with more text."""
        if not (type(block) is type(self) and await self.grow(block)):
            await super()._update_from_block(block)


async def show_blocks(holder: Widget, blocks: Sequence[MarkdownBlock]) -> None:
    """Make `blocks` the children of `holder`. Those that are the same, or only grew, are kept."""
    shown = list(holder.children)
    for old, new in zip(shown, blocks, strict=False):
        if not (type(old) is type(new) and await _keep(old, new)):
            await holder.mount(new, before=old)
            await old.remove()
    if len(shown) > len(blocks):
        await holder.remove_children(shown[len(blocks) :])
    elif len(shown) < len(blocks):
        await holder.mount_all(blocks[len(shown) :])


async def _keep(old: Widget, new: MarkdownBlock) -> bool:
    return isinstance(old, Growing) and await old.grow(new)


class _Cell(Column, OneLayout, Vertical):
    """The blocks of a list item."""


class _Row(OneLayout, Horizontal):
    """A list item: its mark and its blocks."""

    def __init__(self, mark: str, blocks: Sequence[MarkdownBlock]) -> None:
        self.mark, self.cell = mark, _Cell(*blocks)
        bullet = MarkdownBullet()
        bullet.symbol = mark
        super().__init__(bullet, self.cell)


class _GrowingList(Growing):
    """What both kinds of lists share."""

    def marks(self, items: Sequence[MarkdownListItem]) -> list[str]:
        """Return the bullet or number of each item."""
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        """The items."""
        items = list_items(self)
        yield from (_Row(mark, item._blocks) for mark, item in zip(self.marks(items), items, strict=True))
        self._blocks.clear()

    async def grow(self, block: MarkdownBlock) -> bool:
        """Update the items of the list, and append new ones."""
        rows, items = list_rows(self), list_items(block)
        marks = self.marks(items)
        if not rows or [row.mark for row in rows] != marks[: len(rows)]:
            return False
        for row, item in zip(rows, items, strict=False):
            await show_blocks(row.cell, item._blocks)
        added = [_Row(mark, item._blocks) for mark, item in zip(marks, items, strict=True)][len(rows) :]
        if added:
            await self.mount_all(added)
        self._copy_context(block)
        return True


def list_rows(holder: Widget) -> list[_Row]:
    """Return the mounted items of a list."""
    return [row for row in holder.children if isinstance(row, _Row)]


def list_items(block: MarkdownBlock) -> list[MarkdownListItem]:
    """Return the items of a parsed list that is not mounted."""
    return [item for item in block._blocks if isinstance(item, MarkdownListItem)]


class BulletList(_GrowingList, Column, OneLayout, MarkdownBulletList):
    """A list with bullets."""

    def marks(self, items: Sequence[MarkdownListItem]) -> list[str]:
        """Return the bullet of each item."""
        return [item.bullet for item in items]


class OrderedList(_GrowingList, Column, OneLayout, MarkdownOrderedList):
    """A list with numbers, all of the same width."""

    def marks(self, items: Sequence[MarkdownListItem]) -> list[str]:
        """Return the number of each item, counted from that of the first."""
        first = items[0].bullet if items else ""
        start = int(first) if first.isdecimal() else 1
        numbers = [f"{number}. " for number in range(start, start + len(items))]
        return [number.rjust(max(map(len, numbers)) + 1) for number in numbers]


class Quote(Growing, Column, OneLayout, MarkdownBlockQuote):
    """A block quote."""

    async def grow(self, block: MarkdownBlock) -> bool:
        """Update the blocks of the quote, and append new ones."""
        if not self.children:
            return False
        await show_blocks(self, block._blocks)
        self._copy_context(block)
        return True
