"""What a plot shows, apart from how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """One curve, or one group of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    """Of the length of `x`; NaN leaves a gap."""
    dots: bool = False
    """Points, not joined."""


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    name: str
    """Of its files, without an ending."""
    title: str
    words: str
    """What is seen, in a sentence or two."""
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    """The y axis begins at 0."""
    line_at: float | None = None
    """A dashed horizontal line."""


@dataclass(frozen=True)
class Bars:
    """One number a name."""

    name: str
    title: str
    words: str
    label: str
    """Of the numbers."""
    bars: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Heatmap:
    """Numbers in rows and columns."""

    name: str
    title: str
    words: str
    row_label: str
    column_label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """By row; NaN where there is none."""
    decimals: int = 2
    low_is_good: bool = True


def whole(values: Sequence[float]) -> bool:
    """Whether all of `values` are whole numbers, as turns and counts are: an axis names no turn 2.5 then."""
    return all(value == int(value) for value in values if math.isfinite(value))


Picture = Chart | Bars | Heatmap
