"""Parsing of durations such as `90s`, `30m`, `8h`, `2d`."""

from __future__ import annotations

import re

from streamchat.base.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str, flag: str) -> float:
    """Return the seconds of a duration: `8h`, `1h30m` or `45` (seconds).

    Args:
        text: The duration as typed.
        flag: Name of the flag, for the message.

    Raises:
        ConfigError: `text` is not a duration, or is 0.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower(), re.ASCII)
    whole = "".join(number + unit for number, unit in parts)
    total = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if whole != text.strip().lower() or total <= 0:
        raise ConfigError(f"{flag} {text} is not a duration; give for example 90s, 30m, 8h or 2d")
    return total
