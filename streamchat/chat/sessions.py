"""Which settings a saved conversation goes on with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamchat.config import Configuration, check_value
from streamchat.errors import ConfigError
from streamchat.settings import setting_fields, spec_of
from streamchat.store.records import SessionInfo

OF_THE_MACHINE = frozenset({"device", "dtype", "weights", "kernels", "attention"})
"""Settings that belong to where one chats, not to what is said."""
SECTIONS = frozenset({"model", "cache", "generation", "chat"})
_ONE_CHOICE = {"cache_size": "compression_ratio", "compression_ratio": "cache_size"}


def resumed_configuration(configuration: Configuration, info: SessionInfo) -> Configuration:
    """The settings of the session, but for those that were given as flags at this start.

    What the store has and this version does not know, or finds wrong, is left out.
    """
    flags = {name for name, place in configuration.origins.items() if place.startswith("-")}
    flags |= {other for name, other in _ONE_CHOICE.items() if name in flags}
    values: dict[str, Any] = {}
    for name in setting_fields():
        ours = spec_of(name).section in SECTIONS and name not in OF_THE_MACHINE and name not in flags
        if ours and name in info.settings:
            place = f"conversation {info.id}"
            try:
                values[name] = check_value(name, info.settings[name], place)
            except ConfigError:
                continue
    origins = {**configuration.origins, **dict.fromkeys(values, f"conversation {info.id}")}
    return replace(configuration, settings=replace(configuration.settings, **values), origins=origins)
