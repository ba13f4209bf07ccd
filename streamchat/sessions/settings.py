"""Determines the settings that a saved session continues with, and whether its model needs the user's consent."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.config.loader import ARGUMENT_ORIGIN, SESSION_ORIGIN, Configuration, check_value
from streamchat.config.settings import setting_fields, spec_of
from streamchat.store.records import SessionInfo

OF_THE_MACHINE = frozenset({"device", "dtype", "weights", "kernels", "attention"})
"""Settings that belong to the machine, not to the session."""
SECTIONS = frozenset({"model", "cache", "generation", "chat"})
_ONE_CHOICE = {"cache_size": "compression_ratio", "compression_ratio": "cache_size"}


def resumed_configuration(configuration: Configuration, info: SessionInfo) -> Configuration:
    """Return the settings of the session, overridden by the flags of this start, or the arguments of a program.

    Stored settings that this version does not know or rejects are ignored.
    """
    flags = {name for name, place in configuration.origins.items() if place.startswith(("-", ARGUMENT_ORIGIN))}
    flags |= {other for name, other in _ONE_CHOICE.items() if name in flags}
    place = f"{SESSION_ORIGIN}{info.id}"
    others = OF_THE_MACHINE | flags
    values = {
        name: value
        for name, value in valid_settings(info.settings, place).items()
        if spec_of(name).section in SECTIONS and name not in others
    }
    origins = {**configuration.origins, **dict.fromkeys(values, place)}
    return replace(configuration, settings=replace(configuration.settings, **values), origins=origins)


def valid_settings(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the settings that this version knows and accepts; `place` says where they are from."""
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name in setting_fields():
            with suppress(ConfigError):
                settings[name] = check_value(name, value, place)
    return settings


def portable_model_name(model: str) -> str:
    """Return a model name that is valid in any working directory: folders and files become absolute paths."""
    from streamchat.models.resolve import resolve

    with suppress(ModelNotFoundError, OSError, ValueError):
        source = resolve(model)
        if source.kind in ("folder", "gguf"):
            return source.location
    return model


def foreign_model(configuration: Configuration, info: SessionInfo) -> str:
    """Return the model that resuming `info` would load only because an imported file named it; '' for none.

    This is the model of an imported session before its first resume, unless it is the bundled one or the one that this
    start would load anyway. A path is made absolute, so that the user sees what would be loaded.
    """
    if not info.is_imported:
        return ""
    named = portable_model_name(resumed_configuration(configuration, info).settings.model)
    return "" if named in ("default", portable_model_name(configuration.settings.model)) else named


def foreign_model_notice(info: SessionInfo, model: str) -> str:
    """Return what a user must know before `model` of `foreign_model` is loaded."""
    shown = f" (displayed as “{info.model_name}”)" if info.model_name != model else ""
    return f"the imported session {info.id} names the model {model}{shown}, which was never used for it here"
