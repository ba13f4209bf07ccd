"""Draws charts as SVG and PNG with matplotlib, an optional dependency."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable
from contextlib import chdir, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.atomic_files import SHARED, atomic_write, write_text
from streamchat.reports.chart import Bars, Chart, Heatmap, Picture, all_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOW_TO_GET = "pip install matplotlib"
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
"""No metadata, so that the same chart gives the same file."""
MAX_LOG_TICKS = 8
"""Maximum x values of a logarithmic axis that each get a tick."""
SIZE_INCHES = (6.4, 3.6)
_STYLES = ("-", "--", "-.", ":")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _import_matplotlib() -> Any:
    """Import matplotlib without reading a matplotlibrc from the current folder, which has precedence."""
    folder = nullcontext() if "matplotlib" in sys.modules or not Path().exists() else chdir(_matplotlib_folder())
    with folder:
        import matplotlib
    return matplotlib


def _matplotlib_folder() -> Path:
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def svg_of(picture: Picture, *, transparent: bool = True) -> str:
    """Return the `<svg>` element; the same chart gives the same text."""
    matplotlib = _import_matplotlib()
    out = io.StringIO()
    # deterministic ids
    with matplotlib.rc_context({"svg.hashsalt": picture.name}):
        _figure(picture).savefig(out, format="svg", transparent=transparent, metadata=_NO_METADATA)
    text = out.getvalue()
    return text[text.index("<svg") :]


def save_pictures(folder: Path, pictures: Iterable[Picture]) -> list[Path]:
    """Write NAME.svg and NAME.png of each chart to `folder`, on white; return their paths."""
    written = []
    for picture in pictures:
        as_svg, as_png = folder / f"{picture.name}.svg", folder / f"{picture.name}.png"
        write_text(as_svg, svg_of(picture, transparent=False) + "\n", durable=False, mode=SHARED)
        with atomic_write(as_png, durable=False, mode=SHARED) as partial:
            _figure(picture).savefig(partial, format="png", dpi=150)
        written += [as_svg, as_png]
    return written


def _figure(picture: Picture) -> Figure:
    _import_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes: Any = figure.add_subplot()
    if isinstance(picture, Chart):
        _draw_chart(axes, picture)
    elif isinstance(picture, Bars):
        _draw_bars(axes, picture)
    else:
        _draw_heatmap(figure, axes, picture)
    axes.set_title(picture.title, fontsize=10, loc="left")
    return figure


def _draw_chart(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, series in enumerate(chart.series):
        style: dict[str, Any] = {"linewidth": 1.3, "linestyle": _STYLES[number // 10 % len(_STYLES)]}
        if series.dots:
            style = {"linestyle": "none", "marker": ".", "markersize": 2}
        axes.plot(series.x, series.y, label=series.name, color=f"C{number % 10}", **style)
    if chart.line_at is not None:
        axes.axhline(chart.line_at, color="C7", linestyle="--", linewidth=1)
    if chart.log_x:
        axes.set_xscale("log")
        ticks = sorted({x for series in chart.series for x in series.x})
        if len(ticks) <= MAX_LOG_TICKS:  # more readable than powers of ten
            axes.set_xticks(ticks, [f"{x:,g}" for x in ticks])
            axes.minorticks_off()
    if not chart.log_x and all_whole([x for series in chart.series for x in series.x]):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.log_y:
        axes.set_yscale("log")
    elif all_whole([y for series in chart.series for y in series.y]):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if len(chart.series) > 1:
        axes.legend(fontsize=8, frameon=False)


def _draw_bars(axes: Any, picture: Bars) -> None:
    names, values = [name for name, _ in picture.bars], [value for _, value in picture.bars]
    drawn = axes.barh(names, values, color="C0")
    axes.bar_label(drawn, fmt=lambda value: f"{value:,.3g}", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(picture.label)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heatmap(figure: Any, axes: Any, picture: Heatmap) -> None:
    import numpy as np

    values = np.array(picture.values, dtype=float)
    known = values[np.isfinite(values)]
    drawn = axes.imshow(values, aspect="auto", cmap="viridis_r")
    axes.set_xticks(range(len(picture.columns)), picture.columns)
    axes.set_yticks(range(len(picture.rows)), picture.rows)
    axes.set_xlabel(picture.column_label)
    axes.set_ylabel(picture.row_label)
    middle = (known.min() + known.max()) / 2 if len(known) else 0.0
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if math.isfinite(value):
                text, color = f"{value:,.{picture.decimals}f}", "w" if value > middle else "k"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(drawn, ax=axes)
