"""The slash command `/think`: show or switch the reasoning of a model whose chat template has a switch for it."""

from __future__ import annotations

from typing import Any

from streamchat.base.events import ModelInfo
from streamchat.base.requests import SetOption
from streamchat.config.template_args import from_text, shown, to_text
from streamchat.conversation.template.arguments import EFFORT, switch_of
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult

EFFORTS = ("low", "medium", "high")
_STATES = {"on": True, "off": False}


def _think(context: SlashContext, argument: str) -> SlashResult:
    info, word = context.board.info, argument.lower()
    if info is None:
        return SlashResult("the model is not ready yet", error=True)
    if not (switch_of(info.template_reads) or EFFORT in info.template_reads):
        return SlashResult(_no_switch(info), error=bool(argument))
    if not word:
        return SlashResult(_state(context, info))
    name, value = _change(info, word)
    if not name:
        return SlashResult(f"usage: /think {'|'.join(_choices(info))}", error=True)
    given = from_text(context.engine.settings.template_args) | {name: value}
    context.engine.send(SetOption("template_args", to_text(given)))
    return SlashResult(f"{shown({name: value})}, starting with the next turn")


def _no_switch(info: ModelInfo) -> str:
    if info.chat_format == "plain":
        return "without a chat template there is no switch for reasoning"
    return "this model's chat template has no switch for reasoning"


def _change(info: ModelInfo, word: str) -> tuple[str, Any]:
    """Return the argument that `word` changes and its value; ('', None) if the template has no such choice."""
    if word not in _choices(info):
        return "", None
    return (switch_of(info.template_reads), _STATES[word]) if word in _STATES else (EFFORT, word)


def _choices(info: ModelInfo) -> list[str]:
    on_off = list(_STATES) if switch_of(info.template_reads) else []
    return on_off + (list(EFFORTS) if EFFORT in info.template_reads else [])


def _state(context: SlashContext, info: ModelInfo) -> str:
    """Describe whether the model reasons, and why."""
    given, defaults = from_text(context.engine.settings.template_args), from_text(info.template_defaults)
    lines, switch = [], switch_of(info.template_reads)
    for name in filter(None, (switch, EFFORT if EFFORT in info.template_reads else "")):
        value = {**defaults, **given}.get(name, info.thinks if name == switch else None)
        why = shown({name: value}) if name in given or name in defaults else "the chat template's default"
        if name in defaults and name not in given:
            why += ", the catalogue's default for this model"
        state = f"reasoning is {'on' if value else 'off'}" if name == switch else f"{EFFORT} is {value or 'not set'}"
        lines.append(f"{state} ({why})")
    return "\n".join([*lines, f"/think {'|'.join(_choices(info))} changes it"])


def _complete_think(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    info = context.board.info
    return [(each, "") for each in (_choices(info) if info else []) if each.startswith(argument.lower())]


THINK = SlashCommand(
    "think", "[on|off]", "show or switch the model's reasoning", _think, complete=_complete_think, asks_engine=True
)
