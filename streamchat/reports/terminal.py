"""Draws charts as text with plotext, for example for use over SSH."""

from __future__ import annotations

import math
from typing import Any

from streamchat.reports.chart import Bars, Chart, Heatmap, Picture, all_whole

MIN_WIDTH, MAX_WIDTH = 40, 140
HEIGHT = 16
_COLORS = ("blue", "orange", "green", "red", "magenta", "cyan", "yellow", "gray")
_ASCII_MARKERS = "*+xo#%@&"
_PLAIN = str.maketrans("┌┐└┘─│┤├┬┴┼█▌▐", "++++-|++++" + "+###")
_SHADES = " ░▒▓█"
_PLAIN_SHADES = " .:*#"


def text_of(picture: Picture, width: int, *, color: bool, encoding: str = "utf-8") -> str:
    """Return a chart as lines of at most `width` characters, without a final line end.

    Args:
        picture: The chart.
        width: Width of the terminal; limited to 40 to 140 columns.
        color: Whether escape sequences for colors may be used; otherwise curves differ by their markers.
        encoding: Encoding of the terminal; ASCII is used if it lacks braille and box characters.
    """
    width = max(MIN_WIDTH, min(width, MAX_WIDTH))
    rich = _can_encode(encoding)
    if isinstance(picture, Heatmap):
        return _heatmap(picture, rich)
    return _plotted(picture, width, color, rich)


def _can_encode(encoding: str) -> bool:
    try:
        "⣿┌█".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _plotted(picture: Chart | Bars, width: int, color: bool, rich: bool) -> str:
    import plotext

    plot: Any = plotext
    # plotext has one global figure
    plot.clear_figure()
    plot.limit_size(False, False)  # the caller gives the width of the terminal
    plot.theme("clear")
    if isinstance(picture, Bars):
        _draw_bars(plot, picture, width, rich)
    else:
        _draw_chart(plot, picture, width, color, rich)
    plot.title(picture.title)
    text: str = plot.build()
    plot.clear_figure()
    if not color:
        text = plot.uncolorize(text)
    if not rich:
        text = text.translate(_PLAIN)
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _draw_chart(plot: Any, chart: Chart, width: int, color: bool, rich: bool) -> None:
    plot.plotsize(width, HEIGHT)
    for number, series in enumerate(chart.series):
        points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
        if not points:
            continue
        # without colors, or in ASCII, each curve has its own marker
        marker = "braille" if rich and (color or len(chart.series) == 1) else _ASCII_MARKERS[number % 8]
        draw = plot.scatter if series.dots else plot.plot
        xs, ys = [x for x, _ in points], [y for _, y in points]
        draw(xs, ys, label=series.name, marker=marker, color=_COLORS[number % len(_COLORS)])
    if chart.log_x:
        plot.xscale("log")
    if chart.log_y:
        plot.yscale("log")
    if chart.from_zero:
        plot.ylim(lower=0)
    if chart.line_at is not None:
        plot.hline(chart.line_at, "gray")
    for axis, values, log in (("x", _finite(chart, "x"), chart.log_x), ("y", _finite(chart, "y"), chart.log_y)):
        if values and not log and all_whole(values):
            first = 0 if axis == "y" and chart.from_zero else min(values)
            ticks = _whole_ticks(int(first), int(max(values)))
            (plot.xticks if axis == "x" else plot.yticks)(ticks, [f"{tick:,}" for tick in ticks])
    plot.xlabel(chart.x_label)
    plot.ylabel(chart.y_label)


def _finite(chart: Chart, axis: str) -> list[float]:
    return [value for series in chart.series for value in getattr(series, axis) if math.isfinite(value)]


def _whole_ticks(first: int, last: int, count: int = 5) -> list[int]:
    """Return at most `count` evenly spaced whole numbers from `first` to `last`."""
    steps = min(count - 1, last - first)
    return [first + (last - first) * step // max(1, steps) for step in range(steps + 1)]


def _draw_bars(plot: Any, picture: Bars, width: int, rich: bool) -> None:
    names = [f"{name}  {value:,.3g}" for name, value in picture.bars]
    plot.plotsize(width, 2 * len(names) + 5)
    values = [value for _, value in picture.bars]
    plot.bar(names[::-1], values[::-1], orientation="horizontal", width=0.5, marker="sd" if rich else "#")
    plot.xlabel(picture.label)


def _heatmap(picture: Heatmap, rich: bool) -> str:
    """Draw numbers, each after a shade, so that it is readable without colors."""
    known = [value for line in picture.values for value in line if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    shades = _SHADES if rich else _PLAIN_SHADES

    def cell(value: float) -> str:
        if not math.isfinite(value):
            return "-"
        share = (value - low) / (high - low) if high > low else 0.0
        return f"{shades[round(share * (len(shades) - 1))] * 2} {value:,.{picture.decimals}f}"

    lines = [[cell(value) for value in line] for line in picture.values]
    head = max([len(picture.row_label), *map(len, picture.rows)])
    widths = [max(len(name), *(len(line[column]) for line in lines)) for column, name in enumerate(picture.columns)]
    titles = "  ".join(name.rjust(width) for name, width in zip(picture.columns, widths, strict=True))
    body = [
        f"{name.ljust(head)}  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for name, line in zip(picture.rows, lines, strict=True)
    ]
    top = [picture.title, f"{picture.row_label.ljust(head)}  {picture.column_label}", f"{' ' * head}  {titles}"]
    return "\n".join([*top, *body])
