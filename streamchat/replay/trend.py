"""Does a figure grow or shrink with the number of turns? Robustly, and with a confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST = 30
"""Fewer figures say nothing."""
MOST = 600
"""Of more figures so many are taken, spread evenly: the method looks at all pairs."""
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Trend:
    """Theil-Sen slope (the median of all pairs) with Sen's confidence interval, as change over the whole range."""

    change: float
    low: float
    high: float
    median: float
    """Of the figures."""
    count: int

    def grows(self, bound: float) -> bool:
        """Whether even the low end of the interval is above `bound`."""
        return self.low > bound


def trend(values: Sequence[float]) -> Trend | None:
    """Of figures in order; None where there are too few.

    Follows Theil (1950) and Sen (1968), as `scipy.stats.theilslopes` does it.
    """
    import numpy as np
    from scipy.stats import theilslopes

    if len(values) < LEAST:
        return None
    y = np.asarray(values, dtype=float)
    x = np.arange(len(y), dtype=float)
    if len(y) > MOST:
        chosen = np.linspace(0, len(y) - 1, MOST).round().astype(int)
        x, y = x[chosen], y[chosen]
    slope, _, low, high = theilslopes(y, x, alpha=CONFIDENCE)
    span = len(values) - 1
    return Trend(float(slope) * span, float(low) * span, float(high) * span, float(np.median(y)), len(values))
