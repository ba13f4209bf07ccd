"""The figures of a chat, as a program gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from streamchat.base import events as ev
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import rows_text, status_table


@dataclass(frozen=True)
class ChatStatus:
    """The figures of a chat at one moment; `str` and a notebook show them as a table."""

    model: ev.ModelInfo
    cache: ev.CacheState
    """What is cached: length, sinks, pinned tokens, window, evictions."""
    turns: int
    session: str | None
    """Id of the saved session; None if the chat is not saved."""
    table: str
    """All figures with their labels, one per line."""

    def __str__(self) -> str:
        return self.table

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.table)


def status_of(board: StatusBoard) -> ChatStatus:
    """Return the figures of a board on which a model is ready."""
    assert board.info is not None
    rows = [row for group in status_table(board).values() for row in group]
    return ChatStatus(board.info, board.cache, board.turns, board.session, rows_text(rows))
