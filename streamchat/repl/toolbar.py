"""The line under the prompt: cache usage, compressions, memory and speed."""

from __future__ import annotations

import sys

from streamchat.base.ascii_text import in_encoding
from streamchat.base.formatting import human_bytes, plural
from streamchat.frontend.status import StatusBoard

BAR_CELLS = 10


def toolbar_text(board: StatusBoard, columns: int) -> str:
    """The figures that fit into `columns`, most important first."""
    cache = board.cache
    size = cache.cache_size or (board.info.cache_size if board.info else 0)
    parts = [f"cache {cache.length:,}/{size:,} {bar(cache.length, size)}", plural(cache.compressions, "compression")]
    parts.append(memory_text(board))
    if board.decode_tps is not None:
        parts.append(f"{board.decode_tps:.1f} tok/s")
    if board.info is not None:
        parts.append(f"{board.info.name} on {board.info.device}, {board.info.precision}")
    text = " " + parts[0]
    for part in parts[1:]:
        longer = f"{text} · {part}"
        if len(longer) < columns:
            text = longer
    return in_encoding(text, sys.stdout.encoding)


def bar(length: int, size: int) -> str:
    """`[####......]`: the used share of the cache budget, in ASCII."""
    filled = min(BAR_CELLS, -(-length * BAR_CELLS // size)) if size else 0
    return "[" + "#" * filled + "." * (BAR_CELLS - filled) + "]"


def memory_text(board: StatusBoard) -> str:
    """GPU memory if there is a GPU, else process memory, with a label."""
    memory = board.memory
    if memory is None:
        return "memory n/a"
    if memory.allocated_bytes is not None:
        total = f" of {human_bytes(memory.total_bytes)}" if memory.total_bytes else ""
        return f"VRAM {human_bytes(memory.allocated_bytes)} allocated{total}"
    return f"process memory {human_bytes(memory.rss_bytes)}"
