"""Suggests known names for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def did_you_mean(typed: str, names: Iterable[str], *, show: Callable[[str], str] = str, cutoff: float = 0.6) -> str:
    """Return `; did you mean X?` for the name most similar to `typed`; '' if none is. `show` formats that name."""
    close = difflib.get_close_matches(typed, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {show(close[0])}?" if close else ""
