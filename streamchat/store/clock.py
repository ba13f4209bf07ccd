"""Times in the future: they were written while the clock was wrong."""

from __future__ import annotations

import time

CLOCKS_DIFFER_S = 86400.0
"""A time that is further ahead was written while the clock was wrong."""


def latest_time() -> float:
    """Return the latest time, in seconds since 1970, that a correct clock can have written."""
    return time.time() + CLOCKS_DIFFER_S
