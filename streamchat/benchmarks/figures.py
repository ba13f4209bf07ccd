"""Figures over rounds: medians, their spread, and ratios of pairs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from streamchat.base.errors import StreamchatError


def sample_rounds(
    measure: Callable[[], Mapping[str, float]], rounds: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Call `measure` in each of `rounds` rounds, after one to warm up; return its figures by name, one per round."""
    samples = defaultdict[str, list[float]](list)
    for number in range(rounds + 1):
        progress(f"Round {number} of {rounds}")
        figures = measure()
        if number:
            for name, value in figures.items():
                samples[name].append(value)
    return samples


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median, in milliseconds."""
    return 1000 * statistics.median(seconds)


def paired_ratio(parts: Sequence[float], wholes: Sequence[float]) -> float | None:
    """Return the median of part / whole, one pair per round; None without pairs."""
    pairs = list(zip(parts, wholes, strict=False))
    return statistics.median(part / whole for part, whole in pairs) if pairs else None


def failure_text(error: Exception) -> str:
    """Return why there are no figures, on one line; with the type of an error that is not streamchat's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, StreamchatError) else f"{type(error).__name__}: {text[:300]}"


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
