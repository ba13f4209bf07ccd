"""The slash command `/stats`."""

from __future__ import annotations

from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult
from streamchat.frontend.status_table import rows_text, status_rows


def _stats(context: SlashContext, argument: str) -> SlashResult:
    return SlashResult(rows_text(status_rows(context.board)))


STATS = SlashCommand("stats", "", "show cache, memory and speed", _stats, ("status",))
