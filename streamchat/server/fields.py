"""Reads the fields of a request body. Every field is served or refused by its name; none is ignored."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from streamchat.base.errors import ConfigError
from streamchat.base.requests import SettingValue
from streamchat.config.loader import check_value
from streamchat.config.settings import Settings
from streamchat.server.errors import ApiError, wrong_value

DRY = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", *DRY, "seed")
"""Fields with the name and the meaning of a setting."""
SCOPES = ("prompt_cache_key", "safety_identifier", "user")
MAX_STOPS = 4
MAX_SCOPE = 512
Value = TypeVar("Value")


class Fields:
    """The fields of one body.

    Args:
        body: The decoded JSON object.
        neutral: Fields that are not served, with the values that ask for nothing.
        unserved: Other fields of OpenAI's API that are not served.
    """

    def __init__(
        self, body: Mapping[str, Any], neutral: Mapping[str, Collection[Any]], unserved: Collection[str]
    ) -> None:
        self._body, self._neutral, self._unserved = body, neutral, unserved
        self._read: set[str] = set()

    def take(self, name: str, kind: type[Value]) -> Value | None:
        """Return the value of a field; None if it is missing or null.

        Raises:
            ApiError: It has another type.
        """
        self._read.add(name)
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise wrong_value(name, f"{name} must be {_NAMES[kind]}, not {shown(value)}")
        return value

    def require(self, name: str, kind: type[Value]) -> Value:
        """Return the value of a field that every request has."""
        value = self.take(name, kind)
        if value is None:
            raise ApiError(400, f"{name} is missing; it must be {_NAMES[kind]}", name, "missing_required_parameter")
        return value

    def settings(self, *limits: str) -> dict[str, SettingValue]:
        """Return the settings for this reply; `limits` are the names of the maximum number of tokens."""
        settings: dict[str, SettingValue] = {}
        for name in (*SAMPLING, *limits):
            self._read.add(name)
            value = self._body.get(name)
            if value is not None:
                setting = "max_new_tokens" if name in limits else name
                if setting in settings:
                    raise wrong_value(name, f"{' and '.join(limits)} both limit the reply; give one of them")
                settings[setting] = _checked(name, setting, value)
        return settings

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        self._read.add("stop")
        value = self._body.get("stop")
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
            raise wrong_value("stop", f"stop must be a text or a list of texts that are not empty, not {shown(value)}")
        if len(stops) > MAX_STOPS:
            raise wrong_value("stop", f"stop has {len(stops)} texts; at most {MAX_STOPS} are possible")
        return tuple(stops)

    def scope(self) -> str:
        """Return what separates the sessions of one client or user from those of others."""
        parts = [(name, self.take(name, str)) for name in SCOPES]
        for name, value in parts:
            if value is not None and len(value) > MAX_SCOPE:
                raise wrong_value(name, f"{name} has {len(value)} characters; at most {MAX_SCOPE} are possible")
        given = [f"{name}={value}" for name, value in parts if value]
        return json.dumps(given) if given else ""

    def finish(self) -> None:
        """Refuse all fields that were not read.

        Raises:
            ApiError: There is one, and its value asks for something.
        """
        for name, value in self._body.items():
            if name in self._read or value is None or is_one_of(value, self._neutral.get(name, ())):
                continue
            if name in self._neutral:
                raise ApiError(
                    400,
                    f"{name} = {shown(value)} is not served; leave it out, or use {_choices(self._neutral[name])}",
                    name,
                    "unsupported_value",
                )
            if name in self._unserved:
                raise ApiError(400, f"{name} is not served; leave it out", name, "unsupported_parameter")
            known = {*self._read, *self._neutral, *self._unserved}
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else "; leave it out"
            raise ApiError(400, f"{shown(name)} is not a field of this request{hint}", name[:80], "unknown_parameter")


def _checked(name: str, setting: str, value: Any) -> SettingValue:
    if setting == "seed" and isinstance(value, int) and value < 0:
        raise wrong_value(name, f"{name} = {value} is not valid; it must be at least 0")
    try:
        checked: SettingValue = check_value(setting, value, name)
    except ConfigError as error:
        raise wrong_value(name, str(error).replace(setting, name)) from None
    return checked


def is_one_of(value: Any, others: Collection[Any]) -> bool:
    """Return whether a JSON value equals one of the others. Unlike in Python, `true` is not a number."""
    return any(_is_same(value, other) for other in others)


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_is_same(value[name], other[name]) for name in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_is_same, value, other))
    return bool(value == other)


def _choices(values: Collection[Any]) -> str:
    return " or ".join(json.dumps(value) for value in values)


def shown(value: object) -> str:
    """Return a value for a sentence, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:79] + "…"


_NAMES: Mapping[type[Any], str] = {str: "a text", bool: "true or false", int: "a whole number", list: "a list",
                                   dict: "an object", object: "a text or a list"}  # fmt: skip


def system_of(texts: list[str], settings: Settings) -> str | None:
    """Return the system prompt of the client; None if it gave none, or that of the settings."""
    text = "\n\n".join(texts)
    return None if not texts or text == settings.system_prompt else text
