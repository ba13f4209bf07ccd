"""Slopes of what a run with chaos uses and how fast it is, each with its confidence interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from streamchat.base.formatting import human_bytes
from streamchat.replay.chaos.log import ChaosLog
from streamchat.replay.invariants import MEMORY_WARM_UP, without_length
from streamchat.replay.trend import MIN_POINTS, trend

BLOCKS = 60
"""Maximum number of blocks. Neighboring turns are not independent, as the interval assumes; medians of blocks are
closer to that, and a disturbance of a few turns does not change them."""


@dataclass(frozen=True)
class Slope:
    """The Theil-Sen slope of one figure, as change over all measured turns, with Sen's 99 % interval."""

    name: str
    unit: str
    """'bytes', 'count', or 'share' of the usual value."""
    turns: int
    """Turns between the first and the last figure."""
    figures: int
    median: float | None = None
    change: float | None = None
    """None if there are too few figures."""
    low: float | None = None
    high: float | None = None

    @property
    def includes_zero(self) -> bool | None:
        """Whether the interval includes 0; None if there is none."""
        return None if self.low is None or self.high is None else self.low <= 0.0 <= self.high

    def as_dict(self) -> dict[str, Any]:
        """Return the object for the report."""
        return asdict(self) | {"includes_zero": self.includes_zero}

    def show(self, value: float | None) -> str:
        """Format a value of this figure."""
        if value is None:
            return "-"
        if self.unit == "bytes":
            return human_bytes(value)
        return f"{100 * value:.1f} %" if self.unit == "share" else f"{value:g}"


def slopes(log: ChaosLog, rows: Sequence[dict[str, Any]]) -> list[Slope]:
    """Return the slopes of a run. Times leave out the turns that a disturbance may have slowed down.

    Args:
        log: What was recorded.
        rows: Rows of turns.jsonl.
    """
    warm_up = min(MEMORY_WARM_UP, len(rows) // 4)
    samples = [sample for sample in log.samples if sample["index"] >= warm_up]
    found = []
    names = (("memory", "bytes"), ("descriptors", "count"), ("threads", "count"), ("wal", "bytes"))
    for name, unit in names:
        known = [(sample["index"], float(sample[name])) for sample in samples if sample[name] is not None]
        found.append(_slope(name, unit, known))
    found.append(_slope("CPU time per token", "share", _processor_shares(samples, rows)))
    judged = [row for row in rows[warm_up:] if row["index"] not in log.disturbed]
    first = [row for row in judged if row["ttft_s"] is not None]
    shares = without_length([(row["prompt_tokens"], row["ttft_s"]) for row in first])
    found.append(_slope("time to first token", "share", _at(first, shares)))
    decoded = [row for row in judged if row["decode_tps"] and row["new_tokens"] >= 4 and row["compressions"]]
    usual = statistics.median(1 / row["decode_tps"] for row in decoded) if decoded else 1.0
    found.append(_slope("time per token", "share", _at(decoded, [1 / row["decode_tps"] / usual for row in decoded])))
    return found


def _processor_shares(samples: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return the CPU time per token between two samples, as a share of the usual one."""
    tokens = {row["index"]: row["prompt_tokens"] + row["new_tokens"] + row["given_tokens"] for row in rows}
    figures = []
    for before, after in pairwise(samples):
        count = sum(tokens.get(index, 0) for index in range(before["index"] + 1, after["index"] + 1))
        if count:
            figures.append((after["index"], (after["processor_s"] - before["processor_s"]) / count))
    usual = statistics.median(figure for _, figure in figures) if figures else 1.0
    return [(index, figure / usual) for index, figure in figures if figure >= 0]  # a resumed run counts from 0 again


def _at(rows: Sequence[dict[str, Any]], values: Sequence[float]) -> list[tuple[int, float]]:
    return [(row["index"], value) for row, value in zip(rows, values, strict=False)]


def _slope(name: str, unit: str, figures: Sequence[tuple[int, float]]) -> Slope:
    turns = figures[-1][0] - figures[0][0] if figures else 0
    if len(figures) < MIN_POINTS:
        return Slope(name, unit, turns, len(figures))
    values = [value for _, value in figures]
    found = trend(_medians(values, min(BLOCKS, len(values))))
    assert found is not None
    return Slope(name, unit, turns, len(values), found.median, found.change, found.low, found.high)


def _medians(values: Sequence[float], blocks: int) -> list[float]:
    ends = [round(len(values) * block / blocks) for block in range(blocks + 1)]
    return [statistics.median(values[start:stop]) for start, stop in pairwise(ends)]
