"""The sampling settings that a model's makers advise: in its files, or in the catalogue. Needs no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.config.files import short_value
from streamchat.config.loader import Configuration, check_value
from streamchat.config.settings import settings_by_model
from streamchat.models import catalogue
from streamchat.models.gguf.header import HeaderError, read_general
from streamchat.models.resolve import Source, resolve

GENERATION_CONFIG = "generation_config.json"
IN_GENERATION_CONFIG = "the model's generation_config"
IN_GGUF = "the model's GGUF metadata"
IN_CATALOGUE = "the catalogue"
MAX_BYTES = 1_000_000
"""Size limit of a generation_config: far more than one with every field of transformers."""
GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Keys that llama.cpp's converter writes -> settings."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingAdvice:
    """Values of sampling settings for one model."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """Setting name -> legal value."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Setting name -> where the value came from."""
    notes: tuple[str, ...] = ()
    """Notes for the user about values that are not legal."""


def sampling_advice(source: Source, folder: Path | None) -> SamplingAdvice:
    """Return what the files of a model advise, and for other settings what the catalogue does.

    Args:
        source: The model.
        folder: Its folder in transformers' format, with `generation_config.json`; None if it is not there. Ignored for
            GGUF files, whose metadata are read instead.
    """
    own: dict[str, Any] = {}
    where = IN_GENERATION_CONFIG
    if source.kind == "gguf":
        own, where = _from_gguf(Path(source.location)), IN_GGUF
    elif source.kind != "bundled" and folder is not None:
        own = _from_generation_config(folder)
    values: dict[str, Any] = {}
    notes = []
    for name, value in own.items():
        try:
            values[name] = check_value(name, value, where)
        except ConfigError:
            notes.append(f"{where} has {name} = {short_value(value)}, which is not valid, so it is ignored")
    origins = dict.fromkeys(values, where)
    for name, value in catalogue.sampling_of(source.repo_id or source.name).items():
        if name not in values:
            values[name], origins[name] = value, IN_CATALOGUE
    return SamplingAdvice(values, origins, tuple(notes))


def advised(configuration: Configuration) -> Configuration:
    """Return the configuration with the advice for its model, as far as that is known without fetching it."""
    try:
        source = resolve(configuration.settings.model)
    except ModelNotFoundError:  # loading it reports this
        return configuration
    folder = Path(source.location) if source.available and source.kind != "gguf" else None
    advice = sampling_advice(source, folder)
    return configuration.advised_by(advice.values, advice.origins)


def _from_generation_config(folder: Path) -> dict[str, Any]:
    try:
        with (folder / GENERATION_CONFIG).open("rb") as file:
            found = json.loads(file.read(MAX_BYTES + 1))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        _log.warning("%s of %s cannot be read", GENERATION_CONFIG, folder, exc_info=True)
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: found[name] for name in settings_by_model() if found.get(name) is not None}


def _from_gguf(path: Path) -> dict[str, Any]:
    try:
        found = read_general(path)
    except (OSError, HeaderError):  # loading the file reports this
        _log.warning("the metadata of %s cannot be read", path, exc_info=True)
        return {}
    return {name: _exact(found[key]) for key, name in GGUF_KEYS.items() if key in found}


def _exact(value: Any) -> Any:
    """Return a number of GGUF, which has float32, in its shortest form: 0.9 and not 0.8999999761581421."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
