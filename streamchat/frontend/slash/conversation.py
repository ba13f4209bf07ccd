"""The slash commands `/clear` and `/system`."""

from __future__ import annotations

from streamchat.base.requests import Clear, SetSystemPrompt
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult


def _clear(context: SlashContext, argument: str) -> SlashResult:
    context.engine.send(Clear())
    return SlashResult()


def _system(context: SlashContext, argument: str) -> SlashResult:
    if not argument:
        return SlashResult(_system_words(context))
    context.engine.send(SetSystemPrompt("" if argument.lower() == "none" else argument))
    return SlashResult()


def _system_words(context: SlashContext) -> str:
    prompt, info = context.engine.settings.system_prompt, context.board.info
    if prompt:
        return f"system prompt: {prompt}"
    if info is None:
        return "system prompt: not set; the chat template's default is used"
    if not info.template_prompt:
        return "system prompt: none"
    return f"system prompt: not set; the chat template's default is pinned:\n{info.template_prompt}"


CLEAR = SlashCommand(
    "clear",
    "",
    "start a new conversation; keep model, system prompt and settings",
    _clear,
    ("new",),
    starts_over=lambda argument: True,
)
SYSTEM = SlashCommand(
    "system",
    "[TEXT]",
    "show the system prompt, or start over with a new one ('none' removes it)",
    _system,
    starts_over=bool,
)
