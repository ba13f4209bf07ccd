"""docs/evidence.md and its figures, from results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.perplexity import ScoredDocument, curve, losses_in, of_method, segments
from streamchat.benchmarks.score import perplexity
from streamchat.reports.chart import Chart, Series
from streamchat.reports.figure import svg_of
from streamchat.reports.page import Table
from tools.evidence import forgetting
from tools.evidence.forgetting import Asked
from tools.evidence.markdown import as_markdown
from tools.evidence.policies import section, with_section
from tools.evidence.runs import BUDGET, BUDGETS, POLICIES, SINKS

POINTS, LEAST = 60, 256
OURS, WINDOW, DENSE = Method("sinks", BUDGET, 4), Method("window", BUDGET), Method("dense")
MISTAKE, RECOMPUTE = Method("no-rerotation", BUDGET, 4), Method("recompute", BUDGET)


def write_page(
    docs: Path, results: Sequence[ScoredDocument], asked: Sequence[Asked], about: dict[str, Any]
) -> list[Path]:
    """Write the page, its figures and its data; returns their paths."""
    folder = docs / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    charts = _charts(results, asked, about)
    written = []
    for chart in charts:
        path = folder / f"{chart.name}.svg"
        path.write_text(svg_of(chart, transparent=False) + "\n", encoding="utf-8")
        written.append(path)
    data = folder / "evidence.json"
    data.write_text(json.dumps(_data(results, asked, about), indent=1) + "\n", encoding="utf-8")
    page = docs / "evidence.md"
    text, policies = _markdown(results, asked, about, charts), folder / "policies.json"
    if policies.exists():  # the section about eviction policies is measured on its own
        text = with_section(text, section(json.loads(policies.read_text(encoding="utf-8"))))
    page.write_text(text, encoding="utf-8")
    return [*written, data, page]


def _of(results: Sequence[ScoredDocument], policy: Method) -> float:
    value = perplexity(np.concatenate([result.scores.losses for result in of_method(results, policy)]))
    assert value is not None
    return value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _names(results: Sequence[ScoredDocument]) -> list[str]:
    return list(dict.fromkeys(result.document.name for result in results))


def _table(results: Sequence[ScoredDocument], policies: Sequence[Method], names: Sequence[str]) -> str:
    """A row a policy: perplexity over all books, of each book, and memory of keys and values."""
    documents, rows = _names(results), []
    for policy, name in zip(policies, names, strict=True):
        own = of_method(results, policy)
        each = [_number(result.perplexity) for result in own]
        held = max(result.scores.kv_bytes for result in own)
        rows.append((name, _number(_of(results, policy)), *each, f"{held / 1e6:.1f} MB" if held else "-"))
    return as_markdown(Table("", ("", "perplexity", *documents, "keys and values"), tuple(rows)))


def _by_segment(results: Sequence[ScoredDocument], policies: Sequence[Method], size: int) -> str:
    length = max(len(result.document.ids) for result in results)
    rows = [
        (part.name, *(_number(perplexity(losses_in(of_method(results, policy), part))) for policy in policies))
        for part in segments(length, size)
    ]
    return as_markdown(Table("", ("tokens", *(policy.name for policy in policies)), tuple(rows)))


def _series(results: Sequence[ScoredDocument], policies: Sequence[Method]) -> tuple[Series, ...]:
    return tuple(Series(policy.name, *curve(of_method(results, policy), POINTS, LEAST)) for policy in policies)


def _charts(results: Sequence[ScoredDocument], asked: Sequence[Asked], about: dict[str, Any]) -> list[Chart]:
    along, token, nats = "Mean loss over stretches of the books, in nats.", "token of the stream", "nats per token"
    budgets = sorted([*BUDGETS, BUDGET])
    values = [_of(results, Method("sinks", budget, 4)) for budget in budgets]
    policies = list(dict.fromkeys(row.policy for row in asked))
    return [
        Chart(
            "stream",
            f"Log-perplexity along two books, {about['model']}, budget {BUDGET}",
            along,
            token,
            nats,
            _series(results, (DENSE, OURS, WINDOW, MISTAKE)),
        ),
        Chart(
            "sinks",
            f"How many sinks, budget {BUDGET}",
            along,
            token,
            nats,
            _series(results, [WINDOW, *(Method("sinks", BUDGET, count) for count in SINKS)]),
        ),
        Chart(
            "budget",
            "How large a budget, 4 sinks",
            "Perplexity over both books.",
            "budget in tokens",
            "perplexity",
            (Series("4 sinks", [float(budget) for budget in budgets], values),),
            log_x=True,
        ),
        Chart(
            "forgetting",
            f"Asking for five digits, budget {forgetting.BUDGET}",
            "Loss of the answer, in nats per digit; 2.3 is a guess.",
            "tokens between the fact and the question",
            "nats per digit",
            tuple(
                Series(
                    policy.name,
                    [float(row.distance) for row in asked if row.policy == policy],
                    [row.loss for row in asked if row.policy == policy],
                )
                for policy in policies
            ),
            line_at=float(np.log(10)),
            from_zero=True,
        ),
    ]


def _data(results: Sequence[ScoredDocument], asked: Sequence[Asked], about: dict[str, Any]) -> dict[str, Any]:
    return {
        "about": about,
        "policies": [
            {
                "spec": policy.spec,
                "perplexity": _of(results, policy),
                "books": {result.document.name: result.perplexity for result in of_method(results, policy)},
            }
            for policy in POLICIES
        ],
        "forgetting": [
            {"policy": row.policy.spec, "distance": row.distance, "loss": row.loss, "known": row.known} for row in asked
        ],
    }


def _markdown(
    results: Sequence[ScoredDocument], asked: Sequence[Asked], about: dict[str, Any], charts: Sequence[Chart]
) -> str:
    def of(policy: Method) -> float:
        return _of(results, policy)

    counts = [Method("sinks", BUDGET, count) for count in SINKS]
    budgets = [Method("sinks", budget, 4) for budget in sorted([*BUDGETS, BUDGET])]
    late = max(row.distance for row in asked)
    last = {row.policy.kind: row for row in asked if row.distance == late}
    inside = [row for row in asked if row.policy.kind == "sinks" and row.distance <= forgetting.BUDGET // 2]
    claims = {
        DENSE: "nothing evicted (dense)",
        OURS: "4 sinks + window (streamchat)",
        WINDOW: "window alone",
        MISTAKE: "4 sinks + window, positions left alone",
        RECOMPUTE: "window prefilled again for each chunk",
    }
    source = (Path(__file__).parent / "page.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"figure": "{:.2f}".format, "count": "{:,}".format}
    return environment.from_string(source).render(
        about=about,
        books=_names(results),
        length=max(len(result.document.ids) for result in results),
        budget=BUDGET,
        pictures={chart.name: f"![{chart.title}](evidence/{chart.name}.svg)" for chart in charts},
        claims=_table(results, list(claims), list(claims.values())),
        segments=_by_segment(results, (DENSE, OURS, WINDOW, MISTAKE), 2048),
        ours=of(OURS),
        recompute=of(RECOMPUTE),
        window_factor=f"{of(WINDOW) / of(OURS):.1f}",
        mistake_factor=f"{of(MISTAKE) / of(OURS):.1f}",
        sinks=_table(results, [WINDOW, *counts], ["0 sinks", *(f"{count} sink{'s' * (count > 1)}" for count in SINKS)]),
        budgets=_table(results, budgets, [f"{policy.budget:,}" for policy in budgets]),
        one_is_enough=of(Method("sinks", BUDGET, 1)) < 1.01 * min(of(policy) for policy in counts),
        trials=forgetting.TRIALS,
        asked_budget=forgetting.BUDGET,
        asked=_asked_table(asked),
        inside=max(row.loss for row in inside),
        inside_distance=forgetting.BUDGET // 2,
        late=late,
        late_ours=last["sinks"].loss,
        late_dense=last["dense"].loss,
    )


def _asked_table(asked: Sequence[Asked]) -> str:
    found = {(row.policy, row.distance): row.loss for row in asked}
    policies = list(dict.fromkeys(row.policy for row in asked))
    rows = [
        (str(distance), *(f"{found[policy, distance]:.2f}" for policy in policies))
        for distance in dict.fromkeys(row.distance for row in asked)
    ]
    return as_markdown(
        Table("", ("tokens between", *(f"{policy.name}, nats per digit" for policy in policies)), tuple(rows))
    )
