"""The page of `streamchat ppl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamchat.base.formatting import human_bytes, plural
from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.perplexity import ScoredDocument, Segment, curve, losses_in, of_method
from streamchat.benchmarks.score import perplexity
from streamchat.benchmarks.texts import Tokens
from streamchat.reports.chart import Chart, Series
from streamchat.reports.page import Page, Table

Figures = dict[Method, dict[str, Any]]
POINTS, LEAST = 80, 64
"""Maximum points of a curve, and minimum tokens per point, because single tokens are noisy."""


def make_page(
    results: Sequence[ScoredDocument],
    parts: Sequence[Segment],
    about: dict[str, Any],
    heading: Sequence[str],
    notes: Sequence[str],
) -> Page:
    """Build the page from all results.

    Args:
        results: Results; not empty.
        parts: Segments of the table.
        about: Model and arguments, for JSON.
        heading: Model, dtype and device, as text.
        notes: Notes for the reader.
    """
    methods = list(dict.fromkeys(result.method for result in results))
    documents = list({result.document.name: result.document for result in results}.values())
    figures = {method: _figures(method, of_method(results, method), parts) for method in methods}
    tables = [_summary(figures), _by_segment(figures, parts)]
    if len(documents) > 1:
        tables.append(_by_document(figures, documents))
    series = [Series(method.name, *curve(of_method(results, method), POINTS, LEAST)) for method in methods]
    picture = Chart(
        "log-perplexity",
        "Log-perplexity along the stream",
        f"Mean loss of segments of the text, over {plural(len(documents), 'document')}; lower is better.",
        "token of the stream",
        "nats per token",
        tuple(series),
    )
    return Page(
        "ppl",
        "Perplexity",
        [*heading, *map(_length, documents)],
        tables,
        [picture],
        [*notes],
        {**about, "policies": list(figures.values())},
    )


def _length(document: Tokens) -> str:
    cut = f"the first {len(document.ids):,} of {document.total:,}" if len(document.ids) < document.total else ""
    return f"{document.name}: {cut or f'{len(document.ids):,}'} tokens"


def _figures(method: Method, results: Sequence[ScoredDocument], parts: Sequence[Segment]) -> dict[str, Any]:
    """Return the figures of one method over all its documents, for JSON and the tables."""
    scores = [result.scores for result in results]
    return {
        "policy": method.kind,
        "spec": method.spec,
        "cache_size": method.budget or None,
        "num_sink_tokens": method.sinks if method.has_sinks else None,
        "perplexity": perplexity(np.concatenate([each.losses for each in scores])),
        "tokens_scored": sum(each.counted for each in scores),
        "unscorable": sum(each.unscorable for each in scores),
        "longest_cache": max(each.longest for each in scores),
        "kv_bytes": max(each.kv_bytes for each in scores),
        "seconds": sum(each.seconds for each in scores),
        "segments": [
            {"first": part.first, "stop": part.stop, "perplexity": perplexity(losses_in(results, part))}
            for part in parts
        ],
        "documents": [
            {
                "name": result.document.name,
                "tokens": len(result.document.ids),
                "of": result.document.total,
                "perplexity": result.perplexity,
            }
            for result in results
        ],
    }


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def _summary(figures: Figures) -> Table:
    rows = [
        (
            method.name,
            _number(each["perplexity"]),
            f"{each['tokens_scored']:,}",
            f"{each['longest_cache']:,}",
            human_bytes(each["kv_bytes"]),
            f"{sum(one['tokens'] for one in each['documents']) / each['seconds']:,.0f}" if each["seconds"] else "-",
        )
        for method, each in figures.items()
    ]
    columns = ("method", "perplexity", "tokens scored", "longest cache", "keys and values", "tok/s")
    return Table("By method", columns, rows)


def _by_segment(figures: Figures, parts: Sequence[Segment]) -> Table:
    columns = [[_number(part["perplexity"]) for part in each["segments"]] for each in figures.values()]
    rows = list(zip((part.name for part in parts), *columns, strict=True))
    return Table("Perplexity by token of the stream", ("tokens", *(method.name for method in figures)), rows)


def _by_document(figures: Figures, documents: Sequence[Tokens]) -> Table:
    found = [{one["name"]: one["perplexity"] for one in each["documents"]} for each in figures.values()]
    rows = [(each.name, *(_number(column.get(each.name)) for column in found)) for each in documents]
    return Table("Perplexity by document", ("document", *(method.name for method in figures)), rows)
