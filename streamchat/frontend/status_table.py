"""The status table: every figure of a chat with its label, and short forms for one line; all front ends use them.

The sidebar shows the table in sections, `/stats` and `streamchat monitor --once` as text; the toolbar, the status line
of a narrow app and the progress bar of a replay show the short forms.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from streamchat.base import events as ev
from streamchat.base.devices import devices_of
from streamchat.base.formatting import human_bytes, human_count, human_duration, human_seconds, human_speed, plural
from streamchat.base.sanitize import one_line
from streamchat.frontend.status import StatusBoard

UNKNOWN = "–"


class Row(NamedTuple):
    """One figure."""

    label: str
    value: str
    strong: bool = False
    """Shown in bold where the front end can."""


def status_table(board: StatusBoard, prefill: ev.PrefillProgress | None = None) -> dict[str, list[Row]]:
    """The rows of each group: 'cache', 'evicted', 'speed', 'memory', 'totals', 'model'.

    Args:
        prefill: Progress of a running prefill.
    """
    cache, info = board.cache, board.info
    share = f" · {100 * cache.length // cache.cache_size} %" if cache.cache_size else ""
    cached = f"{cache.length:,} / {cache.cache_size:,}{share}" if info is not None else UNKNOWN
    table = {
        "cache": [Row("cached", cached, strong=True)],
        "evicted": [
            Row("compressions", f"{cache.compressions:,}"),
            Row("tokens evicted", f"{cache.tokens_evicted:,}"),
            Row("KV cache", human_bytes(cache.kv_bytes)),
        ],
        "speed": [  # of the current or last turn
            Row("tok/s", f"{board.decode_tps:.1f}" if board.decode_tps is not None else UNKNOWN, strong=True),
            Row("first token", human_seconds(board.ttft_s) if board.ttft_s is not None else UNKNOWN),
        ],
        "memory": memory_rows(board.memory),
        "totals": [
            Row("turns", f"{board.turns:,}"),
            Row("prompt tokens", f"{board.prompt_tokens:,}"),
            Row("generated tokens", f"{board.new_tokens:,}"),
        ],
        "model": _model_rows(info) if info is not None else [],
    }
    if cache.recalled:
        table["evicted"].append(Row("recalled", plural(cache.recalled, "token")))
    if cache.tokens_evicted:  # before the first eviction this is less than the allocation
        table["evicted"].append(Row("without eviction", human_bytes(cache.full_kv_bytes)))
    if board.proposed_tokens:
        percent = 100 * board.accepted_tokens // board.proposed_tokens
        table["speed"].append(Row("accepted proposals", f"{percent} % of {board.proposed_tokens:,}"))
    if prefill is not None:
        table["speed"].append(Row("prefill", f"{prefill.done:,} / {prefill.total:,}"))
    if board.uptime_s is not None:
        table["totals"].append(Row("uptime", human_duration(board.uptime_s)))
    if board.connection:
        table["totals"].append(Row("server", board.connection))
    if board.session is not None:
        table["totals"].append(Row("saved as", board.session))
    return table


def status_rows(board: StatusBoard) -> list[Row]:
    """All rows for a front end without a context map and sections, the model first."""
    table = status_table(board)
    name = [Row("model", one_line(board.info.name))] if board.info is not None else []
    contents = Row("contents", cache_summary(board.cache))
    cache = [*table["cache"], contents, *table["evicted"]]
    return [*name, *table["model"], *cache, *table["memory"], *table["totals"], *table["speed"]]


def rows_text(rows: Iterable[Row]) -> str:
    """The rows as text, with the values in one column."""
    rows = list(rows)
    width = max(len(row.label) for row in rows)
    return "\n".join(f"{row.label:<{width}}  {row.value}" for row in rows)


def short_forms(board: StatusBoard, prefill: ev.PrefillProgress | None = None) -> list[str]:
    """The most important figures, each with its label: cache, compressions, memory, and speed or progress."""
    if board.connection:
        return [board.connection]
    cache = board.cache
    size = cache.cache_size or (board.info.cache_size if board.info else 0)
    forms = [cache_short(cache.length, size), plural(cache.compressions, "compression"), _memory_short(board.memory)]
    if prefill is not None:
        forms.append(f"prefill {prefill.done:,}/{prefill.total:,}")
    elif board.decode_tps is not None:
        forms.append(human_speed(board.decode_tps))
    return forms


def cache_short(length: int, size: int) -> str:
    """`cache 300/1,024`."""
    return f"cache {length:,}/{size:,}"


def cache_summary(cache: ev.CacheState) -> str:
    """`4 sinks, 17 system prompt, 30 pinned, 200 window (63 recalled)`; `pinned` counts turns that the user pinned."""
    system = sum(segment.tokens for segment in cache.segments if segment.part == "system")
    parts = [plural(cache.sinks, "sink")]
    if system:
        parts.append(f"{system:,} system prompt")
    if cache.pinned > system:
        parts.append(f"{cache.pinned - system:,} pinned")
    recalled = f" ({cache.recalled:,} recalled)" if cache.recalled else ""
    return ", ".join([*parts, f"{cache.window:,} window{recalled}"])


def memory_rows(memory: ev.MemoryState | None) -> list[Row]:
    """Rows for VRAM (`n/a` on a CPU) and process memory."""
    if memory is None:
        return [Row("memory", "n/a")]
    rows = []
    if memory.allocated_bytes is None:
        rows.append(Row("VRAM", "n/a (on CPU)"))
    else:
        rows.append(Row("VRAM allocated", human_bytes(memory.allocated_bytes)))
        if memory.reserved_bytes is not None:
            rows.append(Row("VRAM reserved", human_bytes(memory.reserved_bytes)))
        if memory.total_bytes is not None:
            count = len(devices_of(memory.device))
            label = f"VRAM of {count} devices" if count > 1 else "VRAM of device"
            rows.append(Row(label, human_bytes(memory.total_bytes)))
    return [*rows, Row("process memory", human_bytes(memory.rss_bytes))]


def _memory_short(memory: ev.MemoryState | None) -> str:
    """Process memory, after VRAM if there is a GPU: a chat must keep both."""
    if memory is None:
        return "memory n/a"
    process = f"memory {human_bytes(memory.rss_bytes)}"
    return process if memory.allocated_bytes is None else f"VRAM {human_bytes(memory.allocated_bytes)}, {process}"


def _model_rows(info: ev.ModelInfo) -> list[Row]:
    step, reason = info.decode_step, info.decode_reason
    return [
        Row("device", one_line(info.device)),
        Row("dtype", info.precision),
        Row("weights in memory", f"{human_count(info.parameters)}, {human_bytes(info.weight_bytes)}"),
        *([Row("decode step", one_line(f"{step}: {reason}" if reason else step))] if step else []),
        Row("trained context", f"{info.context_length:,}" if info.context_length else "n/a"),
    ]
