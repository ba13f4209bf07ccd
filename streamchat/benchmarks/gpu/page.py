"""The page of `bench --gpu`."""

from __future__ import annotations

from streamchat.benchmarks.gpu.cases import Row, Tenth
from streamchat.benchmarks.gpu.supervisor import Results
from streamchat.reports.page import Table, facts

COLUMNS = (
    *("model", "weights", "keys", "step", "tok/s", "of bandwidth", "kernels", "busy ms"),
    *("first token ms", "prefill tok/s", "not measured because"),
)
CAPTION = (
    "of bandwidth: bytes of weights, keys and values that one token reads x tok/s / measured bandwidth; kernels and "
    "busy ms: per token, by the profiler; first token: a prompt of 32 tokens on a full cache. generate: "
    "transformers' generate with a growing cache; static: with a static cache, compiled."
)


def tables_of(results: Results, cache_size: int, tokens: int) -> list[Table]:
    """Return the rows, the bandwidth, and the tenths of a long reply if there was one."""
    how = "the best of 10 copies of 1 GiB, bytes read and written"
    bandwidth = "-" if results.bandwidth is None else f"{results.bandwidth / 1e9:,.1f} GB/s ({how})"
    found = [
        Table(f"Decoding, {cache_size:,} tokens cached", COLUMNS, [_cells(row) for row in results.rows], CAPTION),
        facts("Memory", {"bandwidth, measured": bandwidth}),
    ]
    if tokens:
        found.append(_flatness(results, tokens))
    return found


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model or row.case.shape,
        row.case.weights,
        row.case.kv_dtype,
        row.case.kind,
        _number(row.tps, ".1f"),
        "-" if row.share is None else f"{row.share:.1%}",
        _number(row.kernels, ","),
        _number(row.busy_ms, ".2f"),
        _number(row.first_token_ms, ".1f"),
        _number(row.prefill_tps, ",.0f"),
        row.error,
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _flatness(results: Results, tokens: int) -> Table:
    ends = {"first tenth": results.tenths[:1], "latest tenth": results.tenths[-1:]}
    rows = [_tenth(name, tenth) for name, found in ends.items() for tenth in found]
    return Table(
        f"One reply of {tokens:,} tokens, {results.flat_model or 'the first model'}",
        ("", "up to token", "tok/s", "MB allocated"),
        rows,
        results.flat_error,
    )


def _tenth(name: str, tenth: Tenth) -> tuple[str, ...]:
    allocated = "-" if tenth.allocated is None else f"{tenth.allocated / 1e6:,.2f}"
    return name, f"{tenth.tokens:,}", f"{tenth.tps:.1f}", allocated
