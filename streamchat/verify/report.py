"""Formats a verification as text, and as one JSON object for scripts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streamchat.base.formatting import human_bytes, plural
from streamchat.verify.measure import RecordedStep
from streamchat.verify.modes import ModeRun
from streamchat.verify.pitfalls import PitfallResult
from streamchat.verify.run import Verification

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


def as_text(result: Verification, heading: str, *, all_steps: bool = False) -> str:
    """Return step tables, checks and verdict as text."""
    budget = f"budget {result.cache_size} ({result.num_sink_tokens} sinks), positions by {result.fit.method}"
    blocks = [f"{heading}\n{budget}"]
    blocks += [_steps_text(run, result.cache_size, all_steps) for run in result.runs]
    if result.pitfalls:
        blocks.append(_pitfalls_text(result.pitfalls, result.cache_size))
    rows = [f"  {'pass' if check.ok else 'FAIL'}  {check.name}\n        {check.detail}" for check in result.checks]
    blocks.append("\n".join(["Checks", *rows]))
    failed = sum(not check.ok for check in result.checks)
    count = len(result.checks)
    blocks.append(f"All {count} checks passed." if not failed else f"{failed} of {count} checks failed.")
    return "\n\n".join(blocks)


def _steps_text(run: ModeRun, cache_size: int, all_steps: bool) -> str:
    lines = [TITLES[run.mode], f"  {'step':>6}{'fed':>6}{'before':>8}{'after':>8}{'memory':>11}  read back"]
    previous = 0
    for step in run.steps if all_steps else _relevant(run.steps, cache_size):
        if step.number > previous + 1:
            lines.append(f"  {'...':>6}")
        previous = step.number
        cells = f"{step.number:>6}{step.fed:>6}{step.before:>8}{step.after:>8}{human_bytes(step.storage_bytes):>11}"
        lines.append(f"  {cells}  {_layers(step.lengths)}")
    if run.mode != "plain":
        lines.append(f"  {plural(run.compressions, 'compression')}, {plural(run.tokens_evicted, 'token')} evicted")
    return "\n".join(lines)


def _relevant(steps: list[RecordedStep], cache_size: int) -> list[RecordedStep]:
    """Return the first and last steps, and those around the one at which the budget is reached."""
    full = next((step.number for step in steps if step.before + step.fed > cache_size), 0)
    wanted = {1, 2, full - 1, full, full + 1, len(steps) - 1, len(steps)}
    return [step for step in steps if step.number in wanted]


def _layers(lengths: Iterable[int]) -> str:
    """(32, 32, 15) -> '2 layers x 32, 1 layer x 15'."""
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length] = counts.get(length, 0) + 1
    return ", ".join(f"{plural(n, 'layer')} x {length:,}" for length, n in counts.items())


def _pitfalls_text(results: list[PitfallResult], cache_size: int) -> str:
    width = max(len(each.name) for each in results)
    head = f"  {'':<{width}}{'counter':>9}{'length':>8}{'memory':>11}{'perplexity':>12}"
    rows = [
        f"  {o.name:<{width}}{o.counter:>9}{o.length:>8}{human_bytes(o.storage_bytes):>11}{o.perplexity:>12.2f}"
        for o in results
    ]
    note = f"  (perplexity of the tokens after the first {cache_size}, on the same text)"
    return "\n".join(["The classic mistakes, side by side", head, *rows, note])
