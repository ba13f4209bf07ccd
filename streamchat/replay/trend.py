"""Robust trend of a figure over the turns, with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

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
    """Return the trend of values in order, or None if there are too few."""
    import numpy as np

    if len(values) < MIN_POINTS:
        return None
    y = np.asarray(values, dtype=float)
    x = np.arange(len(y), dtype=float)
    if len(y) > MAX_POINTS:
        chosen = np.linspace(0, len(y) - 1, MAX_POINTS).round().astype(int)
        x, y = x[chosen], y[chosen]
    slope, low, high = _theil_sen(x, y)
    span = len(values) - 1
    return Trend(slope * span, low * span, high * span, float(np.median(y)), len(values))


def _theil_sen(x: Any, y: Any) -> tuple[float, float, float]:
    """Return the median slope over all pairs of points, and the ends of its confidence interval.

    Theil (1950); the interval is that of Sen (1968), whose equation 2.6 gives the variance of Kendall's statistic for
    tied values. `x` increases.
    """
    import numpy as np

    first, second = np.triu_indices(len(x), 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    _, tied = np.unique(y, return_counts=True)
    variance = (_pairs_variance(len(y)) - sum(_pairs_variance(int(count)) for count in tied)) / 18
    reach = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt(variance)
    low = max(round((len(slopes) - reach) / 2) - 1, 0)
    high = min(round((len(slopes) + reach) / 2), len(slopes) - 1)
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def _pairs_variance(count: int) -> int:
    return count * (count - 1) * (2 * count + 5)
