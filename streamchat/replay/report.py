"""Report of a run: `report.json` for programs, and `report.html`, one self-contained file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from streamchat.base.atomic_files import write_text
from streamchat.base.formatting import human_bytes, human_seconds
from streamchat.replay.invariants import Invariant
from streamchat.replay.run import Totals, versions
from streamchat.reports.chart import Chart, Series
from streamchat.reports.figure import can_draw, svg_of

SCHEMA = 1
"""Version of report.json; see docs/replay.md."""
MAX_POINTS = 2000
"""Maximum points per plot."""


def make_report(
    *,
    about: dict[str, Any],
    settings: dict[str, Any],
    model: dict[str, Any],
    totals: Totals,
    invariants: Iterable[Invariant],
    rows: list[dict[str, Any]],
    problems: list[str],
    ended: str,
) -> dict[str, Any]:
    """Return the object of `report.json`.

    Args:
        about: Arguments of the run, as in run.json.
        settings: Settings of the run.
        model: Properties of the model.
        totals: Totals over all turns.
        invariants: Invariants with their verdicts.
        rows: Rows of turns.jsonl.
        problems: Script lines that could not be used.
        ended: Why the run ended, as text.
    """
    checks = [{**asdict(invariant), "holds": invariant.holds} for invariant in invariants]
    return {
        "schema": SCHEMA,
        "verdict": "all hold" if all(check["holds"] for check in checks) else "violated",
        "ended": ended,
        "written": time.time(),
        "run": about,
        "model": model,
        "settings": settings,
        "versions": versions(),
        "totals": {**asdict(totals), "tokens": totals.tokens},
        "figures": _figures(rows),
        "invariants": checks,
        "problems": problems,
    }


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def summary(name: str) -> dict[str, float] | None:
        values = sorted(row[name] for row in rows if row[name] is not None)
        if not values:
            return None
        return {
            "min": values[0],
            "median": statistics.median(values),
            "p95": values[min(len(values) - 1, int(0.95 * len(values)))],
            "max": values[-1],
        }

    names = ("ttft_s", "decode_tps", "cache_len", "rss_bytes", "vram_bytes", "kv_bytes")
    figures: dict[str, Any] = {name: summary(name) for name in names}
    figures["seconds"] = rows[-1]["at"] - rows[0]["at"] if rows else 0.0
    return figures


def write_report(folder: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Path, Path]:
    """Write both files and return their paths."""
    as_json, as_html = folder / "report.json", folder / "report.html"
    write_text(as_json, json.dumps(report, indent=1) + "\n", durable=False)
    write_text(as_html, html_of(report, rows), durable=False)
    return as_json, as_html


def html_of(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Render the page."""
    import jinja2

    source = (resources.files("streamchat.replay") / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": human_bytes, "seconds": human_seconds, "when": _when, "number": "{:,}".format}
    return environment.from_string(source).render(report=report, charts=_charts(rows), rows=rows[-20:])


def _when(then: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))


# --- plots --------------------------------------------------------------------------------------------------------


def _charts(rows: list[dict[str, Any]]) -> list[dict[str, str]] | None:
    """Return title, caption and SVG of each plot, or None if matplotlib is not installed."""
    if not can_draw():
        return None
    thinned = rows[:: max(1, -(-len(rows) // MAX_POINTS))]
    plots: list[tuple[str, str, str, Callable[[dict[str, Any]], float | None], bool]] = [
        ("Cache length", "tokens", "Cached tokens per layer; dashed: the budget.", _of("cache_len"), False),
        ("Compressions", "", "Evictions of the conversation so far.", _of("compressions"), False),
        ("Process memory", "MB", "Resident memory of the process.", _of("rss_bytes", 1e-6), False),
        ("Device memory", "MB", "Device memory in live tensors.", _of("vram_bytes", 1e-6), False),
        ("Time to first token", "ms", "From the message to the first token of the reply.", _of("ttft_s", 1e3), True),
        ("Decode speed", "tok/s", "Tokens per second after the first one.", _of("decode_tps"), True),
    ]
    charts = []
    for title, unit, words, figure, dots in plots:
        points = [(row["index"] + 1, figure(row)) for row in thinned]
        known = [(float(x), y) for x, y in points if y is not None]
        if known:
            xs, ys = [x for x, _ in known], [y for _, y in known]
            budget = float(thinned[-1]["cache_size"]) if title == "Cache length" else None
            series = Series(title, xs, ys, dots)
            # the page shows the title and caption next to the plot
            chart = Chart(title, "", words, "turn", unit, (series,), from_zero=True, line_at=budget)
            charts.append({"title": title, "words": words, "svg": svg_of(chart, (6.4, 2.4))})
    return charts


def _of(name: str, scale: float = 1.0) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: None if row[name] is None else row[name] * scale
