"""Figures over rounds: medians, their spread, and ratios of pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median, in milliseconds."""
    return 1000 * statistics.median(seconds)


def paired_ratio(parts: Sequence[float], wholes: Sequence[float]) -> float | None:
    """Return the median of part / whole, one pair per round; None without pairs."""
    pairs = list(zip(parts, wholes, strict=False))
    return statistics.median(part / whole for part, whole in pairs) if pairs else None


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format the median, minimum and maximum: `24.1 (23.8-25.0)`."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def summary(values: Sequence[float], unit: str = "") -> dict[str, float] | None:
    """Return the median, minimum and maximum for JSON, under names that end with `unit`; None without values."""
    if not values:
        return None
    return {f"median{unit}": statistics.median(values), f"min{unit}": min(values), f"max{unit}": max(values)}
