"""The page of `streamchat ppl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamchat.base.formatting import human_bytes, plural
from streamchat.benchmarks.perplexity import ScoredDocument, Segment, curve, losses_in, of_policy
from streamchat.benchmarks.policies import Policy
from streamchat.benchmarks.score import perplexity
from streamchat.reports.chart import Chart, Series
from streamchat.reports.page import Page, Table

POINTS, LEAST = 80, 64
"""Maximum points of a curve, and minimum tokens per point, because single tokens are noisy."""


def make_page(
    results: Sequence[ScoredDocument],
    parts: Sequence[Segment],
    about: dict[str, Any],
    heading: str,
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
    policies = list(dict.fromkeys(result.policy for result in results))
    documents = list(dict.fromkeys(result.document.name for result in results))
    tables = [_summary(results, policies), _by_segment(results, policies, parts)]
    if len(documents) > 1:
        tables.append(_by_document(results, policies, documents))
    series = []
    for policy in policies:
        xs, ys = curve(of_policy(results, policy), POINTS, LEAST)
        series.append(Series(policy.name, xs, ys))
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
        (heading, *_documents(results)),
        tuple(tables),
        (picture,),
        tuple(notes),
        {**about, **_data(results, policies, parts)},
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


def _summary(results: Sequence[ScoredDocument], policies: Sequence[Policy]) -> Table:
    rows = []
    for policy in policies:
        own = of_policy(results, policy)
        scores = [result.scores for result in own]
        fed, seconds = sum(len(result.document.ids) for result in own), sum(each.seconds for each in scores)
        rows.append(
            (
                policy.name,
                _number(_of(own)),
                f"{sum(each.counted for each in scores):,}",
                f"{max(each.longest for each in scores):,}",
                human_bytes(max(each.kv_bytes for each in scores)),
                f"{fed / seconds:,.0f}" if seconds else "-",
            )
        )
    columns = ("policy", "perplexity", "tokens scored", "longest cache", "keys and values", "tok/s")
    return Table("By policy", columns, tuple(rows))


def _by_segment(results: Sequence[ScoredDocument], policies: Sequence[Policy], parts: Sequence[Segment]) -> Table:
    rows = [
        (part.name, *(_number(perplexity(losses_in(of_policy(results, policy), part))) for policy in policies))
        for part in parts
    ]
    return Table("Perplexity by token of the stream", ("tokens", *(policy.name for policy in policies)), tuple(rows))


def _by_document(results: Sequence[ScoredDocument], policies: Sequence[Policy], documents: Sequence[str]) -> Table:
    found = {(result.document.name, result.policy): result.perplexity for result in results}
    rows = [(name, *(_number(found.get((name, policy))) for policy in policies)) for name in documents]
    return Table("Perplexity by document", ("document", *(policy.name for policy in policies)), tuple(rows))


def _data(results: Sequence[ScoredDocument], policies: Sequence[Policy], parts: Sequence[Segment]) -> dict[str, Any]:
    def of(policy: Policy) -> dict[str, Any]:
        own = of_policy(results, policy)
        return {
            "policy": policy.kind,
            "spec": policy.spec,
            "cache_size": policy.budget or None,
            "num_sink_tokens": policy.sinks if policy.has_sinks else None,
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

    return {"policies": [of(policy) for policy in policies]}
