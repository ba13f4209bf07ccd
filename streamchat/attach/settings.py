"""The settings of an attached front end: the interface has its own, and the session has all others."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.requests import ResetOption, SetOption
from streamchat.config.loader import Configuration, check_live, check_value
from streamchat.config.settings import default_of, setting_fields, spec_of

INTERFACE = "interface"
"""The section of a front end's own settings; those of all other sections belong to the session."""


def is_own(name: str) -> bool:
    """Return whether a setting belongs to the front end."""
    return name in setting_fields() and spec_of(name).section == INTERFACE


class SharedSettings:
    """The settings in use, with their origins.

    Args:
        configuration: The settings of the front end.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration

    def use(self, settings: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        """Use the settings of the session, except those that this version does not know or accept."""
        values: dict[str, Any] = {}
        for name, value in settings.items():
            if name in setting_fields() and not is_own(name):
                with suppress(ConfigError):
                    values[name] = check_value(name, value, "the server")
        before = self.configuration
        kept = {name: origin for name, origin in before.origins.items() if name not in values}
        self.configuration = replace(
            before,
            settings=replace(before.settings, **values),
            origins=kept | {name: origins[name] for name in values if name in origins},
        )

    def follow(self, event: ev.SettingChanged) -> None:
        """Use a changed setting of the session."""
        if not is_own(event.name):
            is_default = event.name in setting_fields() and event.value == default_of(event.name)
            self.use({event.name: event.value}, {event.name: "the default" if is_default else "/set"})

    def change(self, request: SetOption | ResetOption) -> ev.Event:
        """Change a setting of the front end; return the event that reports the change, or why there is none."""
        name = request.name
        try:
            check_live(name)
            if isinstance(request, SetOption):
                change: dict[str, Any] = {name: check_value(name, request.value, "/set")}
                changed = replace(self.configuration, settings=replace(self.configuration.settings, **change))
                self.configuration = changed.with_origin(name, "/set")
            else:
                self.configuration = self.configuration.without(name)
        except ConfigError as error:
            return ev.Notice(str(error), "warning")
        return ev.SettingChanged(name, getattr(self.configuration.settings, name))
