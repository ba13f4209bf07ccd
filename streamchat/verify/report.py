"""The page of a verification, and its JSON object for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from streamchat.base.formatting import human_bytes, plural
from streamchat.reports.chart import Chart, Picture, Series
from streamchat.reports.machine import machine_line
from streamchat.reports.page import Page, Table
from streamchat.verify.measure import RecordedStep
from streamchat.verify.modes import ModeRun
from streamchat.verify.run import PitfallResult, Verification

TITLES = {
    "plain": "Custom loop, nothing evicted",
    "manual": "Custom loop, StreamingCache under its hook",
    "generate": "generate() in a StreamingPress",
}


def as_dict(result: Verification, model: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object: settings, every step, every check, the verdict."""
    return {
        "ok": result.ok,
        "model": model,
        "cache_size": result.cache_size,
        "num_sink_tokens": result.num_sink_tokens,
        "method": result.fit.method,
        "position_limit": result.fit.position_limit,
        "fit_error": result.fit.error,
        "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in result.checks],
        "modes": {
            run.mode: {
                "compressions": run.compressions,
                "tokens_evicted": run.tokens_evicted,
                "steps": [
                    {
                        "step": step.number,
                        "fed": step.fed,
                        "before": step.before,
                        "after": step.after,
                        "layers": list(step.lengths),
                        "storage_bytes": step.storage_bytes,
                    }
                    for step in run.steps
                ],
            }
            for run in result.runs
        },
        "pitfalls": [vars(each) for each in result.pitfalls],
    }


def make_page(result: Verification, model: dict[str, Any], *, all_steps: bool = False) -> Page:
    """Return step tables, checks and verdict as a page.

    Args:
        result: The verification.
        model: Name, source, device, dtype and attention of the model.
        all_steps: Show every step, not only the informative ones.
    """
    cache = "" if (model.get("cache_dtype") or model["dtype"]) == model["dtype"] else f", {model['cache_dtype']} cache"
    heading = f"{model['name']}, {model['dtype']} on {model['device']}{cache}, {model['attention']} attention"
    budget = f"budget {result.cache_size} ({result.num_sink_tokens} sinks), positions by {result.fit.method}"
    tables = [_steps_table(run, result.cache_size, all_steps) for run in result.runs]
    if result.pitfalls:
        tables.append(_pitfalls_table(result.pitfalls, result.cache_size))
    checks = [("pass" if check.ok else "FAIL", check.name, check.detail) for check in result.checks]
    tables.append(Table("Checks", ("", ""), [row for ok, name, detail in checks for row in ((ok, name), ("", detail))]))
    failed, count = sum(not check.ok for check in result.checks), len(result.checks)
    verdict = f"{failed} of {count} checks failed." if failed else f"All {count} checks passed."
    data = as_dict(result, model)
    lines, pictures = [heading, budget, machine_line()], [_chart(result.runs)]
    return Page("verify", "Verification", lines, tables, pictures, data=data, verdict=verdict, ok=result.ok)


def _chart(runs: Sequence[ModeRun]) -> Picture:
    series = [
        Series(TITLES[run.mode], [float(step.number) for step in run.steps], [float(step.after) for step in run.steps])
        for run in runs
    ]
    words = "Length of the longest layer after each forward pass, read from its keys."
    return Chart("cache-length", "Cache length", words, "step", "tokens", tuple(series), from_zero=True)


def _steps_table(run: ModeRun, cache_size: int, all_steps: bool) -> Table:
    rows: list[Sequence[str]] = []
    previous = 0
    for step in run.steps if all_steps else _relevant(run.steps, cache_size):
        if step.number > previous + 1:
            rows.append(("...", "", "", "", "", ""))
        previous = step.number
        numbers = map(str, (step.number, step.fed, step.before, step.after))
        rows.append((*numbers, human_bytes(step.storage_bytes), _layers(step.lengths)))
    counts = f"{plural(run.compressions, 'compression')}, {plural(run.tokens_evicted, 'token')} evicted"
    columns = ("step", "fed", "before", "after", "memory", "read back")
    return Table(TITLES[run.mode], columns, rows, "" if run.mode == "plain" else counts)


def _relevant(steps: list[RecordedStep], cache_size: int) -> list[RecordedStep]:
    """Return the first and last steps, and those around the one at which the budget is reached."""
    full = next((step.number for step in steps if step.before + step.fed > cache_size), 0)
    wanted = {1, 2, full - 1, full, full + 1, len(steps) - 1, len(steps)}
    return [step for step in steps if step.number in wanted]


def _layers(lengths: Iterable[int]) -> str:
    """(32, 32, 15) -> '2 layers x 32, 1 layer x 15'."""
    return ", ".join(f"{plural(n, 'layer')} x {length:,}" for length, n in Counter(lengths).items())


def _pitfalls_table(results: list[PitfallResult], cache_size: int) -> Table:
    rows = [
        (each.name, str(each.counter), str(each.length), human_bytes(each.storage_bytes), f"{each.perplexity:.2f}")
        for each in results
    ]
    words = f"Perplexity of the tokens after the first {cache_size}, on the same text."
    columns = ("", "counter", "length", "memory", "perplexity")
    return Table("The classic mistakes, side by side", columns, rows, words)
