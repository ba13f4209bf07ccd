"""Contents of charts, independent of how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """A curve, or a group of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    """Same length as `x`; NaN leaves a gap."""
    dots: bool = False
    """Draw points instead of a line."""


@dataclass(frozen=True)
class Chart:
    """Curves over a common x axis."""

    name: str
    """File name without extension."""
    title: str
    caption: str
    """One or two sentences about the chart."""
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    """Start the y axis at 0."""
    line_at: float | None = None
    """y value of a dashed horizontal line."""


@dataclass(frozen=True)
class Bars:
    """One number per name."""

    name: str
    title: str
    caption: str
    label: str
    """Label of the numbers."""
    bars: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Heatmap:
    """A grid of numbers; low ones are good."""

    name: str
    title: str
    caption: str
    row_label: str
    column_label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """One tuple per row; NaN if missing."""
    decimals: int = 2


def all_whole(values: Sequence[float]) -> bool:
    """Whether all finite values are whole numbers, such as turns and counts: the axis then has no tick at 2.5."""
    return all(value == int(value) for value in values if math.isfinite(value))


Picture = Chart | Bars | Heatmap
