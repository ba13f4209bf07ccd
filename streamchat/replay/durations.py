"""`90s`, `30m`, `8h`, `2d`: how people write durations."""

from __future__ import annotations

import re

from streamchat.base.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str, place: str) -> float:
    """Seconds of `8h`, `1h30m` or `45` (seconds).

    Raises:
        ConfigError: It is none, or 0.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower())
    whole = "".join(number + unit for number, unit in parts)
    total = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if whole != text.strip().lower() or total <= 0:
        raise ConfigError(f"{place} {text}: a duration such as 90s, 30m, 8h or 2d is wanted")
    return total
