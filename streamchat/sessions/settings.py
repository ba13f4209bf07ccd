"""Determines the settings that a saved session continues with, and whether its model needs the user's consent."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.config.loader import ARGUMENT_ORIGIN, SESSION_ORIGIN, Configuration, check_value
from streamchat.config.settings import default_of, setting_fields, settings_by_model, spec_of
from streamchat.config.template_args import from_text, merged, to_text
from streamchat.store.records import SessionInfo

OF_THE_MACHINE = frozenset({"device", "dtype", "weights", "kernels", "decode", "attention", "kv_dtype"})
"""Settings that belong to the machine, not to the session."""
SECTIONS = frozenset({"model", "cache", "generation", "chat"})
_ONE_CHOICE = {"cache_size": "compression_ratio", "compression_ratio": "cache_size"}


def resumed_configuration(configuration: Configuration, info: SessionInfo) -> Configuration:
    """Return the settings of the session, overridden by the flags of this start, or the arguments of a program.

    Stored settings that this version does not know or rejects are ignored.
    """
    flags = {name for name, place in configuration.origins.items() if place.startswith(("-", ARGUMENT_ORIGIN))}
    flags |= {other for name, other in _ONE_CHOICE.items() if name in flags}
    if "model" in flags:
        flags.add("adapter")  # that of the session belongs to its own model
    place = f"{SESSION_ORIGIN}{info.id}"
    others = OF_THE_MACHINE | flags
    values = {
        name: value
        for name, value in valid_settings(info.settings, place).items()
        if spec_of(name).section in SECTIONS and name not in others
    }
    if "model" in values and "adapter" not in flags:
        values.setdefault("adapter", "")  # saved before the setting existed
    origins = {**configuration.origins, **dict.fromkeys(values, place)}
    for name in [name for name in flags if name in setting_fields() and spec_of(name).is_table]:
        given = from_text(getattr(configuration.settings, name))
        parts = {part: value for part, value in given.items() if f"{name}.{part}" in flags}
        saved = valid_settings(info.settings, place).get(name, default_of(name))
        values[name] = merged(saved, to_text(parts))
    return replace(configuration, settings=replace(configuration.settings, **values), origins=origins)


def without_session_sampling(configuration: Configuration, given: Configuration) -> Configuration:
    """Return the configuration without the sampling settings of a resumed session, for another model.

    They are those `given` at the start again; what that did not give is free for the advice of the model.
    """
    of_session = {
        name for name in settings_by_model() if configuration.origins.get(name, "").startswith(SESSION_ORIGIN)
    }
    values = {name: getattr(given.settings, name) for name in of_session}
    origins = {name: origin for name, origin in configuration.origins.items() if name not in of_session}
    origins |= {name: given.origins[name] for name in of_session if name in given.origins}
    return replace(configuration, settings=replace(configuration.settings, **values), origins=origins)


def sampling_notices(resumed: Configuration, new_chat: Configuration) -> list[str]:
    """Return a notice if a resumed session samples otherwise than a new chat with its model would."""
    names = [
        name
        for name in settings_by_model()
        if resumed.origins.get(name, "").startswith(SESSION_ORIGIN)
        and getattr(resumed.settings, name) != getattr(new_chat.settings, name)
    ]
    if not names:
        return []
    kept, usual = (
        ", ".join(f"{name} {getattr(each.settings, name):g}" for name in names) for each in (resumed, new_chat)
    )
    return [f"This session keeps the sampling settings that it was run with: {kept}; a new chat would use {usual}."]


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
        if source.kind in ("folder", "gguf") and not source.repo_id:
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
