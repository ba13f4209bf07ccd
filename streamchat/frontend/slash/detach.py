"""The slash command `/detach`: leave a chat on a server, which continues there."""

from __future__ import annotations

from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult

EMBEDDED = (
    "this chat runs in this terminal and ends with it; to leave a chat running, start `streamchat serve` and use "
    "`streamchat attach`"
)


def _detach(context: SlashContext, argument: str) -> SlashResult:
    if not context.engine.server:
        return SlashResult(EMBEDDED, error=True)
    return SlashResult(quit=True)


DETACH = SlashCommand("detach", "", "leave a chat on a server; the reply continues there", _detach)
