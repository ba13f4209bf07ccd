"""The line under the prompt: cache usage, compressions, memory, speed and model."""

from __future__ import annotations

import sys

from streamchat.base.ascii_text import in_encoding
from streamchat.frontend.status import StatusBoard
from streamchat.frontend.status_table import short_forms

BAR_CELLS = 10


def toolbar_text(board: StatusBoard, columns: int) -> str:
    """The figures that fit into `columns`, most important first."""
    cache, *parts = short_forms(board)
    if board.info is not None:
        parts.append(f"{board.info.name} on {board.info.device}, {board.info.precision}")
    text = f" {cache} {bar(board.cache.length, board.cache.cache_size)}"
    for part in parts:
        longer = f"{text} · {part}"
        if len(longer) < columns:
            text = longer
    return in_encoding(text, sys.stdout.encoding)


def bar(length: int, size: int) -> str:
    """`[####......]`: the used share of the cache budget, in ASCII."""
    filled = min(BAR_CELLS, -(-length * BAR_CELLS // size)) if size else 0
    return "[" + "#" * filled + "." * (BAR_CELLS - filled) + "]"
