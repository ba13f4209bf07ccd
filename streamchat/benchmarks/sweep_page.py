"""The page of `streamchat sweep`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streamchat.base.formatting import human_bytes
from streamchat.benchmarks.sweep import Recommendation, Row
from streamchat.reports.chart import Heatmap, Picture
from streamchat.reports.page import Page, Table

Figure = Callable[[Row], float | None]


def make_page(
    rows: Sequence[Row],
    recommendations: Sequence[Recommendation],
    lines: Sequence[str],
    notes: Sequence[str],
    about: dict[str, Any],
) -> Page:
    """Build the page from all results of the grid.

    Args:
        rows: Rows, in the order of the grid.
        recommendations: One per model.
        lines: Description of the sweep, as lines of text.
        notes: Notes for the reader.
        about: Description of the sweep, for JSON.
    """
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(row.model, []).append(row)
    pictures: list[Picture] = []
    for number, (model, own) in enumerate(models.items(), 1):
        pictures += _heatmaps(model, own, "" if len(models) == 1 else f"-{number}")
    advice = [f"Recommended for {each.text}" for each in recommendations]
    return Page(
        "sweep",
        "Sweep",
        [*lines],
        [_table(model, own) for model, own in models.items()],
        pictures,
        [*advice, *notes],
        {
            **about,
            "rows": [row.as_dict() for row in rows],
            "recommendations": [
                {
                    "model": each.row.model,
                    "cache_size": each.row.method.budget,
                    "num_sink_tokens": each.row.method.sinks,
                    "perplexity": each.row.perplexity,
                    "lowest_perplexity": each.best.perplexity,
                }
                for each in recommendations
            ],
        },
    )


def _table(model: str, rows: Sequence[Row]) -> Table:
    def of(row: Row) -> tuple[str, ...]:
        return (
            row.method.name,
            f"{row.perplexity:.2f}" if row.perplexity < 1e5 else f"{row.perplexity:.1e}",
            f"{row.decode_ms:.1f}" if row.decode_ms is not None else "-",
            f"{row.score_tps:,.0f}",
            human_bytes(row.kv_bytes),
            human_bytes(row.weight_bytes + row.kv_bytes),
        )

    columns = ("method", "perplexity", "ms per token", "scored tok/s", "keys and values", "with weights")
    words = (
        "ms per token: median of single tokens at the end of the text. Processes that ran in parallel share the CPU."
    )
    return Table(f"{model}, {rows[0].ran_in}", columns, [*map(of, rows)], words)


def _heatmaps(model: str, rows: Sequence[Row], suffix: str) -> list[Heatmap]:
    """Draw perplexity, time per token and memory over sinks and budget; a method without sinks counts as 0 sinks."""
    found = {(row.method.sinks, row.method.budget): row for row in rows if row.method.kind in ("sinks", "window")}
    sinks, budgets = sorted({key[0] for key in found}), sorted({key[1] for key in found})
    if len(found) < 2:
        return []
    figures: list[tuple[str, str, str, int, Figure]] = [
        ("perplexity", "Perplexity", "Lower is better.", 2, lambda row: row.perplexity),
        ("time", "Milliseconds per token", "One token with a full cache.", 1, lambda row: row.decode_ms),
        ("memory", "MB of keys and values", "Allocated buffers.", 1, lambda row: row.kv_bytes / 1e6),
    ]

    def cell(sink: int, budget: int, figure: Figure) -> float:
        row = found.get((sink, budget))
        value = None if row is None else figure(row)
        return float("nan") if value is None else value

    return [
        Heatmap(
            f"sweep-{name}{suffix}",
            f"{title}, {model}",
            words,
            "sinks",
            "budget in tokens",
            tuple(map(str, sinks)),
            tuple(f"{budget:,}" for budget in budgets),
            tuple(tuple(cell(sink, budget, figure) for budget in budgets) for sink in sinks),
            decimals,
        )
        for name, title, words, decimals, figure in figures
    ]
