"""The page of `streamchat ppl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamchat.base.formatting import human_bytes, plural
from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.perplexity import ScoredDocument, Segment, curve, losses_in, of_method
from streamchat.benchmarks.score import perplexity
from streamchat.reports.chart import Chart, Series
from streamchat.reports.page import Page, Table

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
    documents = list(dict.fromkeys(result.document.name for result in results))
    tables = [_summary(results, methods), _by_segment(results, methods, parts)]
    if len(documents) > 1:
        tables.append(_by_document(results, methods, documents))
    series = []
    for method in methods:
        xs, ys = curve(of_method(results, method), POINTS, LEAST)
        series.append(Series(method.name, xs, ys))
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
        [*heading, *_documents(results)],
        tables,
        [picture],
        [*notes],
        {**about, **_data(results, methods, parts)},
    )


def _documents(results: Sequence[ScoredDocument]) -> list[str]:
    lines = []
    for document in {result.document.name: result.document for result in results}.values():
        cut = f"the first {len(document.ids):,} of {document.total:,}" if len(document.ids) < document.total else ""
        lines.append(f"{document.name}: {cut or f'{len(document.ids):,}'} tokens")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def _of(results: Sequence[ScoredDocument]) -> float | None:
    """Return the perplexity over all tokens of these results."""
    return perplexity(np.concatenate([result.scores.losses for result in results]))


def _summary(results: Sequence[ScoredDocument], methods: Sequence[Method]) -> Table:
    rows = []
    for method in methods:
        own = of_method(results, method)
        scores = [result.scores for result in own]
        fed, seconds = sum(len(result.document.ids) for result in own), sum(each.seconds for each in scores)
        rows.append(
            (
                method.name,
                _number(_of(own)),
                f"{sum(each.counted for each in scores):,}",
                f"{max(each.longest for each in scores):,}",
                human_bytes(max(each.kv_bytes for each in scores)),
                f"{fed / seconds:,.0f}" if seconds else "-",
            )
        )
    columns = ("method", "perplexity", "tokens scored", "longest cache", "keys and values", "tok/s")
    return Table("By method", columns, rows)


def _by_segment(results: Sequence[ScoredDocument], methods: Sequence[Method], parts: Sequence[Segment]) -> Table:
    rows = [
        (part.name, *(_number(perplexity(losses_in(of_method(results, method), part))) for method in methods))
        for part in parts
    ]
    return Table("Perplexity by token of the stream", ("tokens", *(method.name for method in methods)), rows)


def _by_document(results: Sequence[ScoredDocument], methods: Sequence[Method], documents: Sequence[str]) -> Table:
    found = {(result.document.name, result.method): result.perplexity for result in results}
    rows = [(name, *(_number(found.get((name, method))) for method in methods)) for name in documents]
    return Table("Perplexity by document", ("document", *(method.name for method in methods)), rows)


def _data(results: Sequence[ScoredDocument], methods: Sequence[Method], parts: Sequence[Segment]) -> dict[str, Any]:
    def of(method: Method) -> dict[str, Any]:
        own = of_method(results, method)
        return {
            "policy": method.kind,
            "spec": method.spec,
            "cache_size": method.budget or None,
            "num_sink_tokens": method.sinks if method.has_sinks else None,
            "perplexity": _of(own),
            "tokens_scored": sum(result.scores.counted for result in own),
            "unscorable": sum(result.scores.unscorable for result in own),
            "longest_cache": max(result.scores.longest for result in own),
            "kv_bytes": max(result.scores.kv_bytes for result in own),
            "seconds": sum(result.scores.seconds for result in own),
            "segments": [
                {"first": part.first, "stop": part.stop, "perplexity": perplexity(losses_in(own, part))}
                for part in parts
            ],
            "documents": [
                {
                    "name": result.document.name,
                    "tokens": len(result.document.ids),
                    "of": result.document.total,
                    "perplexity": result.perplexity,
                }
                for result in own
            ],
        }

    return {"policies": [of(method) for method in methods]}
