"""Robust trend of a figure over the turns, with a confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_POINTS = 30
"""Minimum number of values for a trend."""
MAX_POINTS = 600
"""Subsample to this many evenly spaced points: Theil-Sen is quadratic."""
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Trend:
    """Theil-Sen slope (the median over all pairs) with Sen's confidence interval, as change over the whole range."""

    change: float
    low: float
    high: float
    median: float
    """Median of the values."""
    count: int

    def grows(self, bound: float) -> bool:
        """Return whether even the low end of the interval is above `bound`."""
        return self.low > bound


def trend(values: Sequence[float]) -> Trend | None:
    """Return the trend of values in order, or None if there are too few.

    Follows Theil (1950) and Sen (1968), as implemented in `scipy.stats.theilslopes`.
    """
    import numpy as np
    from scipy.stats import theilslopes

    if len(values) < MIN_POINTS:
        return None
    y = np.asarray(values, dtype=float)
    x = np.arange(len(y), dtype=float)
    if len(y) > MAX_POINTS:
        chosen = np.linspace(0, len(y) - 1, MAX_POINTS).round().astype(int)
        x, y = x[chosen], y[chosen]
    slope, _, low, high = theilslopes(y, x, alpha=CONFIDENCE)
    span = len(values) - 1
    return Trend(float(slope) * span, float(low) * span, float(high) * span, float(np.median(y)), len(values))
