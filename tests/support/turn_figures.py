"""Figures of a finished turn, for tests of what saves and reports them."""

from __future__ import annotations

from streamchat.base import events as ev


def stats_of(turn: int) -> ev.TurnStats:
    """Return figures of turn `turn`; the other values are always the same."""
    return ev.TurnStats(turn, 11, 12, 40, 64, 1, 5, 0.5, 9.5, 1000, 2000, None, "length", (1, 2))
