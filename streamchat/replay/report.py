"""Report of a run: `report.json` for programs, and `report.html`, one self-contained file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamchat.base.atomic_files import write_text
from streamchat.base.formatting import human_bytes, human_seconds, plural
from streamchat.replay.chaos.section import chaos_tables
from streamchat.replay.invariants import Invariant
from streamchat.replay.run import Totals
from streamchat.reports.chart import Chart, Picture, Series
from streamchat.reports.figure import can_draw
from streamchat.reports.machine import machine_line, versions
from streamchat.reports.page import Page, Table, as_html, facts

SCHEMA = 1
"""Version of report.json; see docs/replay.md."""
MAX_POINTS = 2000
"""Maximum points per plot."""
MAX_PROBLEMS = 100
"""Maximum unusable lines of scripts on the page."""


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
    figures["seconds"] = _seconds(rows)
    return figures


def _seconds(rows: list[dict[str, Any]]) -> float:
    """Return how long the run took; by the wall clock if an earlier version wrote the rows."""
    if not rows:
        return 0.0
    last = rows[-1]
    return float(last["elapsed_s"] if "elapsed_s" in last else last["at"] - rows[0]["at"])


def write_report(folder: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Path, Path]:
    """Write both files and return their paths."""
    as_json, html = folder / "report.json", folder / "report.html"
    write_text(as_json, json.dumps(report, indent=1) + "\n", durable=False)
    write_text(html, as_html(make_page(report, rows)), durable=False)
    return as_json, html


def make_page(report: dict[str, Any], rows: list[dict[str, Any]]) -> Page:
    """Build the page from the object of `report.json` and the rows of turns.jsonl."""
    model, holds, size = report["model"], report["verdict"] == "all hold", report["settings"]["cache_size"]
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(report["written"]))
    cached = f"{model['name']}, {model['dtype']} on {model['device']}, cache {size:,} tokens"
    notes = [f"Not used: {problem}" for problem in report["problems"][:MAX_PROBLEMS]]
    if left_out := len(report["problems"][MAX_PROBLEMS:]):
        notes.append(f"Not used: {plural(left_out, 'more line')}.")
    if not can_draw():
        again = f"streamchat replay --resume-run FOLDER --max-turns {report['totals']['turns']}"
        notes.append(f"Once matplotlib is installed, `{again}` writes this page again, with charts.")
    return Page(
        "report",
        "streamchat replay",
        [cached, machine_line(), f"written {written}; {report['ended']}"],
        [
            facts("Totals", _totals(report)),
            _invariants(report["invariants"]),
            *(chaos_tables(report["chaos"]) if "chaos" in report else []),
            _last_turns(rows[-20:]),
            facts("Settings and versions", report["run"] | report["settings"] | report["versions"]),
        ],
        _charts(rows),
        notes,
        report,
        "All invariants hold" if holds else "Violated",
        holds,
    )


def _totals(report: dict[str, Any]) -> dict[str, str]:
    totals, figures = report["totals"], report["figures"]
    formats: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "longest cache": ("cache_len", "max", "{:,} tokens".format),
        "time to first token, median": ("ttft_s", "median", human_seconds),
        "decode speed, median": ("decode_tps", "median", "{:.1f} tok/s".format),
        "peak process memory": ("rss_bytes", "max", human_bytes),
    }
    names = ("turns", "conversations", "tokens", "compressions", "tokens_evicted")
    return {name.replace("_", " "): f"{totals[name]:,}" for name in names} | {
        title: show(figures[name][kind]) for title, (name, kind, show) in formats.items() if figures[name]
    }


def _invariants(checks: list[dict[str, Any]]) -> Table:
    columns = ("invariant", "result", "what must hold", "checked", "violations", "first violation or last figures")
    rows = []
    for check in checks:
        result = "VIOLATED" if not check["holds"] else "holds" if check["checked"] else "not checked"
        counts = f"{check['checked']:,}", f"{check['violations']:,}"
        rows.append((check["name"], result, check["what"], *counts, check["first"] or check["last"]))
    return Table("Invariants", columns, rows)


def _last_turns(rows: list[dict[str, Any]]) -> Table:
    columns = ("turn", "script", "prompt", "reply", "cache", "first token", "tok/s", "end")
    cells = [
        (
            f"{row['index'] + 1:,}",
            row["place"],
            str(row["prompt_tokens"]),
            str(row["new_tokens"] or row["given_tokens"]),
            f"{row['cache_len']} / {row['cache_size']}",
            "-" if row["ttft_s"] is None else human_seconds(row["ttft_s"]),
            f"{row['decode_tps']:.1f}" if row["decode_tps"] else "-",
            row["failed"] or row["finish_reason"],
        )
        for row in rows
    ]
    return Table("The last turns", columns, cells)


# --- plots --------------------------------------------------------------------------------------------------------


def _charts(rows: list[dict[str, Any]]) -> list[Picture]:
    thinned = rows[:: max(1, -(-len(rows) // MAX_POINTS))]
    plots: list[tuple[str, str, str, str, float, bool]] = [
        ("Cache length", "tokens", "Cached tokens per layer; dashed: the budget.", "cache_len", 1, False),
        ("Compressions", "", "Evictions of the conversation so far.", "compressions", 1, False),
        ("Process memory", "MB", "Resident memory of the process.", "rss_bytes", 1e-6, False),
        ("Device memory", "MB", "Device memory in live tensors.", "vram_bytes", 1e-6, False),
        ("Time to first token", "ms", "From the message to the first token of the reply.", "ttft_s", 1e3, True),
        ("Decode speed", "tok/s", "Tokens per second after the first one.", "decode_tps", 1, True),
    ]
    charts: list[Picture] = []
    for title, unit, words, name, scale, dots in plots:
        known = [(float(row["index"] + 1), scale * row[name]) for row in thinned if row[name] is not None]
        if known:
            xs, ys = [x for x, _ in known], [y for _, y in known]
            budget = float(thinned[-1]["cache_size"]) if name == "cache_len" else None
            series = Series(title, xs, ys, dots)
            charts.append(Chart(name, title, words, "turn", unit, (series,), from_zero=True, line_at=budget))
    return charts
