"""The slash command `/set`: show and change settings during a chat."""

from __future__ import annotations

import re

from streamchat.base.requests import SetOption
from streamchat.config import loader
from streamchat.config.settings import setting_fields, spec_of
from streamchat.frontend.slash.registry import SlashCommand, SlashContext, SlashResult

_NAME_VALUE = re.compile(r"\s*([^\s=]*)\s*=?(.*)", re.DOTALL)


def _live_settings() -> list[str]:
    return [name for name in setting_fields() if spec_of(name).live]


def _set(context: SlashContext, argument: str) -> SlashResult:
    given = _NAME_VALUE.match(argument)
    assert given is not None  # it matches every text
    name, value = given[1].lower().replace("-", "_"), given[2].strip()
    settings = context.engine.settings
    if not name:
        rows = [
            f"{key} = {getattr(settings, key)}  ({spec_of(key).legal()}; source: {context.engine.origin(key)})"
            for key in _live_settings()
        ]
        return SlashResult("\n".join(rows))
    if not value and name in setting_fields():
        about = f"{spec_of(name).help}; {spec_of(name).legal()}; source: {context.engine.origin(name)}"
        return SlashResult(f"{name} = {getattr(settings, name)}  ({about})")
    loader.check_live(name)
    checked = loader.check_value(name, loader.parse_text(name, value, "/set"), "/set")
    context.engine.send(SetOption(name, checked))
    return SlashResult(f"{name} = {checked}, starting with the next turn")


def _complete_set(context: SlashContext, argument: str) -> list[tuple[str, str]]:
    name, space, value = argument.partition(" ")
    settings = context.engine.settings
    if not space:
        return [(key, f"now {getattr(settings, key)}") for key in _live_settings() if key.startswith(name)]
    if name not in _live_settings():
        return []
    now = getattr(settings, name)
    choices = [choice for choice in spec_of(name).choices if choice.startswith(value.lstrip())]
    return [(f"{name} {choice}", "now" if choice == now else "") for choice in choices]


def _changes(argument: str) -> bool:
    given = _NAME_VALUE.match(argument)
    return given is not None and bool(given[2].strip())


SET = SlashCommand(
    "set",
    "[NAME [VALUE]]",
    "show or change a setting for the next turns",
    _set,
    complete=_complete_set,
    changes_engine=_changes,
)
