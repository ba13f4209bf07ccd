"""What a run leaves: `report.json` for programs and `report.html`, one file that needs nothing beside it."""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from streamchat.paths import write_private
from streamchat.replay.invariants import Invariant
from streamchat.replay.run import Totals, versions
from streamchat.units import human_bytes, human_seconds

SCHEMA = 1
"""Of report.json; see docs/replay.md."""
PLOTTED = 2000
"""Points of a curve; of more turns so many are taken."""


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
    """The object of `report.json`.

    Args:
        about: What was asked for, as in run.json.
        settings: In force.
        model: Facts of the model.
        totals: Of all turns.
        invariants: With their verdicts.
        rows: Of turns.jsonl.
        problems: Lines of the scripts that could not be used.
        ended: Why the run is over, in words.
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
    """Write both files; returns their paths."""
    as_json, as_html = folder / "report.json", folder / "report.html"
    write_private(as_json, json.dumps(report, indent=1) + "\n")
    write_private(as_html, html_of(report, rows))
    return as_json, as_html


def html_of(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page."""
    import jinja2

    source = (resources.files("streamchat.replay") / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": human_bytes, "seconds": human_seconds, "when": _when, "number": "{:,}".format}
    return environment.from_string(source).render(report=report, charts=_charts(rows), rows=rows[-20:])


def _when(then: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))


# --- plots --------------------------------------------------------------------------------------------------------


def _charts(rows: list[dict[str, Any]]) -> list[dict[str, str]] | None:
    """Title, words and SVG of each plot; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("svg")
    thinned = rows[:: max(1, -(-len(rows) // PLOTTED))]
    plots: list[tuple[str, str, str, Callable[[dict[str, Any]], float | None], str]] = [
        (
            "Cache length",
            "tokens",
            "Tokens that every layer holds; dashed: the budget.",
            _of("cache_len"),
            "-",
        ),
        ("Compressions", "", "Evictions of the conversation so far.", _of("compressions"), "-"),
        ("Process memory", "MB", "Resident memory of the process.", _of("rss_bytes", 1e-6), "-"),
        ("Device memory", "MB", "Device memory in live tensors.", _of("vram_bytes", 1e-6), "-"),
        ("Time to first token", "ms", "From the message to the first token of the reply.", _of("ttft_s", 1e3), "."),
        ("Decode speed", "tok/s", "Tokens a second after the first one.", _of("decode_tps"), "."),
    ]
    charts = []
    for title, unit, words, figure, style in plots:
        points = [(row["index"] + 1, figure(row)) for row in thinned]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            budget = thinned[-1]["cache_size"] if title == "Cache length" else None
            charts.append({"title": title, "words": words, "svg": _plot(known, unit, style, budget)})
    return charts


def _of(name: str, scale: float = 1.0) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: None if row[name] is None else row[name] * scale


def _plot(points: list[tuple[int, float]], unit: str, style: str, budget: int | None) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([x for x, _ in points], [y for _, y in points], style, color="C0", linewidth=1.2, markersize=2)
    if budget is not None:
        axes.axhline(budget, color="C7", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("turn")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    out = io.StringIO()
    # no date: the same run gives the same file
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
