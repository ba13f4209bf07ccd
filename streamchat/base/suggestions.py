"""Suggests known names for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def similar_names(typed: str, names: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return at most `most` of `names`, the most similar to `typed` first.

    Args:
        typed: The unknown name.
        names: The known names.
        most: Maximum number of results.
        cutoff: Least similarity, 0 to 1.
    """
    return difflib.get_close_matches(typed, list(names), n=most, cutoff=cutoff)


def did_you_mean(typed: str, names: Iterable[str], *, show: Callable[[str], str] = str, cutoff: float = 0.6) -> str:
    """Return `; did you mean X?` for the name most similar to `typed`; '' if none is. `show` formats that name."""
    close = similar_names(typed, names, cutoff=cutoff)
    return f"; did you mean {show(close[0])}?" if close else ""
