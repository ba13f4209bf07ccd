"""Sweep grid, result journal and recommendation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamchat.base.errors import ConfigError
from streamchat.base.eviction_policies import POLICIES
from streamchat.benchmarks.cell import Cell, ModelChoice, digest_of
from streamchat.benchmarks.methods.registry import Method, make_method
from streamchat.benchmarks.texts import Document


def grid(kinds: Sequence[str], budgets: Sequence[int], sinks: Sequence[int]) -> list[Method]:
    """Return all combinations as methods, each once.

    Raises:
        ConfigError: A combination is impossible.
    """
    found = [make_method(kind, budget, sink) for kind in kinds for budget in budgets for sink in sinks]
    return list(dict.fromkeys(found))


def cells_of(
    models: Sequence[ModelChoice],
    methods: Sequence[Method],
    documents: Sequence[Document],
    max_tokens: int,
    chunk: int,
) -> list[tuple[Cell, Document]]:
    """Return all cells, grouped by model, so that workers rarely have to load another model."""
    digests = [digest_of(document) for document in documents]
    return [
        (Cell(model, method, document.name, digest, max_tokens, chunk), document)
        for model in models
        for method in methods
        for document, digest in zip(documents, digests, strict=True)
    ]


class Journal:
    """Finished results, one JSON line per cell, written as soon as a cell is done.

    Args:
        path: Path of the file; a line that a crash truncated is ignored.

    Raises:
        ConfigError: The file is not a journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self._known[row["id"]] = row["result"]
            except (ValueError, KeyError, TypeError):
                continue
        if text.strip() and not self._known and text.endswith("\n"):
            raise ConfigError(f"{path} is not a journal of streamchat sweep; give another --out")
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as stream:
                stream.write("\n")

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the figures of a cell, or None if it has not run or has failed."""
        found = self._known.get(cell.id)
        return None if found is None or "error" in found else found

    def write(self, cell: Cell, result: dict[str, Any]) -> None:
        """Append a result."""
        self._known[cell.id] = result
        row = {"id": cell.id, "at": time.time(), "cell": asdict(cell), "result": result}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Row:
    """One model under one method, over all documents."""

    model: str
    method: Method
    perplexity: float
    decode_ms: float | None
    """Median time of a single token at the end of a text, over documents."""
    score_tps: float
    """Tokens scored per second."""
    kv_bytes: int
    weight_bytes: int
    documents: int
    ran_in: str

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        numbers = {"cache_size": self.method.budget or None, "num_sink_tokens": self.method.sinks}
        rest = {key: value for key, value in asdict(self).items() if key != "method"}
        return {"policy": self.method.kind, "spec": self.method.spec, **numbers, **rest}


def rows_of(results: Iterable[tuple[Cell, dict[str, Any]]]) -> list[Row]:
    """Return a row for each model and method whose documents all succeeded."""
    groups: dict[tuple[str, Method], list[dict[str, Any]]] = {}
    for cell, result in results:
        groups.setdefault((cell.model.name, cell.method), []).append(result)
    rows = []
    for (model, method), parts in groups.items():
        if any("error" in part for part in parts) or not sum(part["scored"] for part in parts):
            continue
        times = sorted(part["decode_ms"] for part in parts if part["decode_ms"] is not None)
        rows.append(
            Row(
                model,
                method,
                math.exp(min(700.0, sum(part["loss"] for part in parts) / sum(part["scored"] for part in parts))),
                times[len(times) // 2] if times else None,
                sum(part["tokens"] for part in parts) / sum(part["seconds"] for part in parts),
                max(part["kv_bytes"] for part in parts),
                parts[0]["weight_bytes"],
                len(parts),
                parts[0]["ran_in"],
            )
        )
    return rows


@dataclass(frozen=True)
class Recommendation:
    """Recommended settings for one model."""

    row: Row
    best: Row
    """The row with the lowest perplexity of the grid."""

    @property
    def text(self) -> str:
        """The recommendation as a sentence."""
        method, above = self.row.method, self.row.perplexity / self.best.perplexity - 1
        found = (
            f"the lowest of the grid ({self.row.perplexity:.2f})"
            if above < 5e-4
            else f"{100 * above:.1f} % above the lowest of the grid ({self.best.perplexity:.2f} with "
            f"{self.best.method.name})"
        )
        evict = f"evict = {method.kind}, " if method.kind in POLICIES else ""
        return (
            f"{self.row.model}: {evict}cache_size = {method.budget}, num_sink_tokens = {method.sinks}; perplexity "
            f"{self.row.perplexity:.2f}, {found}."
        )


def recommend(rows: Sequence[Row], tolerance: float) -> list[Recommendation]:
    """Recommend, for each model, the smallest budget, then the fewest sinks, within relative `tolerance` of the best.

    Considers only what streamchat supports: eviction policies, `sinks`, and `window` as 0 sinks.
    """
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        usable = [row for row in rows if row.model == model and row.method.kind in ("sinks", "window", *POLICIES)]
        if not usable:
            continue
        best = min(usable, key=lambda row: row.perplexity)
        good = [row for row in usable if row.perplexity <= best.perplexity * (1 + tolerance)]
        found.append(Recommendation(min(good, key=lambda row: (row.method.budget, row.method.sinks)), best))
    return found
