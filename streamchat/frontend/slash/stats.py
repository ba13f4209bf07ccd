"""The slash command `/stats`."""

from __future__ import annotations

from streamchat.base.formatting import human_bytes, human_seconds, plural
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult
from streamchat.frontend.status import cache_summary, memory_figures


def _stats(context: SlashContext, argument: str) -> SlashResult:
    board = context.board
    cache = board.cache
    rows: list[tuple[str, str]] = []
    if board.info is not None:
        info = board.info
        rows.append(
            (
                "model",
                f"{info.name} ({info.precision} on {info.device}, {human_bytes(info.weight_bytes)} in memory)",
            )
        )
    rows.append(("cache length", f"{cache.length:,} / {plural(cache.cache_size, 'token')} ({cache_summary(cache)})"))
    rows.append(("compressions", f"{cache.compressions:,} ({plural(cache.tokens_evicted, 'token')} evicted)"))
    rows.append(
        (
            "KV cache",
            f"{human_bytes(cache.kv_bytes)} allocated ({human_bytes(cache.full_kv_bytes)} needed without eviction)",
        )
    )
    rows += memory_figures(board.memory)
    rows.append(
        ("turns", f"{board.turns:,} ({plural(board.prompt_tokens, 'prompt token')}, {board.new_tokens:,} generated)")
    )
    if board.ttft_s is not None:
        rows.append(("first token", human_seconds(board.ttft_s)))
    if board.decode_tps is not None:
        rows.append(("speed", f"{board.decode_tps:.1f} tok/s"))
    width = max(len(label) for label, _ in rows)
    return SlashResult("\n".join(f"{label:<{width}}  {value}" for label, value in rows))


STATS = SlashCommand("stats", "", "show cache, memory and speed", _stats, ("status",))
