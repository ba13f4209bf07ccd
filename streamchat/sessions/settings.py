"""Which settings a saved conversation continues with, and whether its model may be loaded without a question."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.config.loader import SESSION_ORIGIN, Configuration, check_value
from streamchat.config.settings import setting_fields, spec_of
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
    place = f"{SESSION_ORIGIN}{info.id}"
    for name in setting_fields():
        ours = spec_of(name).section in SECTIONS and name not in OF_THE_MACHINE and name not in flags
        if ours and name in info.settings:
            try:
                values[name] = check_value(name, info.settings[name], place)
            except ConfigError:
                continue
    origins = {**configuration.origins, **dict.fromkeys(values, place)}
    return replace(configuration, settings=replace(configuration.settings, **values), origins=origins)


def lasting_name(model: str) -> str:
    """A model's name that means the same from another folder: a folder or file by its absolute path."""
    from streamchat.models.resolve import resolve

    with suppress(ModelNotFoundError, OSError, ValueError):
        source = resolve(model)
        if source.kind in ("folder", "gguf"):
            return source.location
    return model


def foreign_model(configuration: Configuration, info: SessionInfo) -> str:
    """The model that resuming `info` would load only because a file named it; '' for none.

    That is the model of an imported session before its first resume, unless it is the bundled one or the one that this
    start would load anyway. A path is made absolute, so that the user sees what would be read.
    """
    if not info.is_imported:
        return ""
    named = lasting_name(resumed_configuration(configuration, info).settings.model)
    return "" if named in ("default", lasting_name(configuration.settings.model)) else named


def foreign_model_sentence(info: SessionInfo, model: str) -> str:
    """What a user must know before `model` of `foreign_model` is loaded."""
    shown = f", shown as “{info.model_name}”," if info.model_name != model else ""
    return f"the imported conversation {info.id} names the model {model}{shown} which was never used for it here"
