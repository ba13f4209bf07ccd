"""`streamchat bench --serve`: the API over HTTP, compared with the embedded chat on the same model.

Needs the optional packages of the server. The clients and the server are one process, so that both chats use the same
model, one after the other, and no other program's load falls on one of them only.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace

from streamchat.base.formatting import human_bytes, plural
from streamchat.base.progress import Progress
from streamchat.benchmarks.loading import about, heading
from streamchat.benchmarks.serving_runs import (
    KEPT_MESSAGES,
    Bench,
    Dropping,
    Sizes,
    Slice,
    Switching,
    Timing,
    Turns,
)
from streamchat.config.loader import Configuration
from streamchat.reports.page import Page, Table, facts
from streamchat.server.options import require_libraries

EARLY = (5, 15)
"""Turns whose times are compared with those of the last ones."""
LAST = 11


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure the server.

    Raises:
        ConfigError: An optional package is missing.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    require_libraries()
    sizes = Sizes(args.serve_turns, args.serve_sessions, args.serve_tokens, args.rounds)
    settings = replace(configuration.settings, temperature=0.0, max_new_tokens=sizes.tokens, speculation="off")
    bench = Bench(replace(configuration, settings=settings), progress, sizes, args.serve_client)
    turns, dropping, switching, slices = bench.turns(), bench.dropping(), bench.switching(), bench.slices()
    tables = [_turns_table(turns), _dropping_table(dropping), _switching_table(switching), _slices_table(slices)]
    loaded = bench.loaded
    lines = heading(loaded, f"cache of {settings.cache_size:,} tokens", plural(sizes.turns, "turn"))
    data = about("bench", loaded) | {
        "turns": turns.as_dict(),
        "dropping": dropping.as_dict(),
        "switching": switching.as_dict(),
        "slices": [each.as_dict() for each in slices],
    }
    return Page("bench-serve", "Serving", lines, tables, notes=[*loaded.notes], data=data)


def _turns_table(turns: Turns) -> Table:
    early, late = _windows(len(turns.served))
    rows = []
    for name, found in (("the server", turns.served), ("the chat without a server", turns.embedded)):
        for clock, values in (("elapsed", [each.elapsed_s for each in found]), ("CPU", [each.cpu_s for each in found])):
            rows.append([f"{name}, {clock}", *_early_and_late(values, early, late)])
    for clock, pairs in (
        ("elapsed", [a.elapsed_s - b.elapsed_s for a, b in zip(turns.served, turns.embedded, strict=True)]),
        ("CPU", [a.cpu_s - b.cpu_s for a, b in zip(turns.served, turns.embedded, strict=True)]),
    ):
        rows.append([f"difference at the same turns, {clock}", *_early_and_late(pairs, early, late)[:2], ""])
    growth, slope = turns.memory_growth, turns.memory_slope
    caption = (
        f"Medians in milliseconds, from the request (CPU: from the start of the turn, on the model's thread) to the "
        f"first text. Client: {turns.client}. Memory of the process grew by {human_bytes(growth)} in the second half "
        f"of the turns, {human_bytes(round(slope))} per 100 turns."
    )
    columns = ("time to the first text", f"turns {early[0]}-{early[1]}", f"turns {late[0]}-{late[1]}", "late / early")
    return Table("One conversation, new messages only", columns, rows, caption)


def _windows(turns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first and last turn of the two windows that are compared, counted from 1."""
    last = (max(1, turns - LAST + 1), turns)
    return (EARLY if turns >= 2 * EARLY[1] else (1, max(1, turns // 2))), last


def _early_and_late(seconds: Sequence[float], early: tuple[int, int], late: tuple[int, int]) -> list[str]:
    first, second = (1000 * statistics.median(seconds[start - 1 : stop]) for start, stop in (early, late))
    return [f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f} x" if first else ""]


def _dropping_table(dropping: Dropping) -> Table:
    return facts(
        f"A client that sends its newest {KEPT_MESSAGES} messages each time",
        {
            "turns": dropping.turns,
            "tokens of the chat template around a message": dropping.template,
            "these tokens": dropping.template_text,
            "other tokens that were prefilled, at most": dropping.others,
            "tokens fed before the reply that the usage leaves out, at most": dropping.uncounted,
        },
    )


def _switching_table(switching: Switching) -> Table:
    rows = [
        [name, *(f"{value:.1f}" for value in _spread(times))]
        for name, times in (
            ("elapsed", [each.elapsed_s for each in switching.times]),
            ("CPU", [each.cpu_s for each in switching.times]),
        )
    ]
    caption = (
        f"Milliseconds to save the session in the seat and to restore another one, {len(switching.times)} times. "
        f"Memory of the process grew by {human_bytes(switching.memory_growth)} from the first round to the last."
    )
    title = f"{plural(switching.sessions, 'session')} in turn on one seat"
    return Table(title, ("switch", "minimum", "median", "p95"), rows, caption)


def _spread(times: Sequence[float]) -> tuple[float, float, float]:
    p95 = statistics.quantiles(times, n=20, method="inclusive")[-1] if len(times) > 1 else times[0]
    return 1000 * min(times), 1000 * statistics.median(times), 1000 * p95


def _slices_table(slices: Sequence[Slice]) -> Table:
    rows = [
        [
            str(each.steps),
            f"{statistics.median(each.speeds):.2f} ({min(each.speeds):.2f}-{max(each.speeds):.2f})",
            f"{statistics.median(each.cpu):.2f}",
            f"{1000 * statistics.median(each.later_first_s):.0f}",
        ]
        for each in slices
    ]
    alone: list[Timing] = [pair for each in slices for pair in each.alone]
    elapsed = 1000 * statistics.median(each.elapsed_s for each in alone)
    cpu = 1000 * statistics.median(each.cpu_s for each in alone)
    caption = (
        "Each pair of replies at a time follows a pair of which one waits for the other: tokens per second and CPU "
        f"time of the process, divided by those (medians: {elapsed:.2f} ms and {cpu:.2f} ms of CPU time per token). "
        "First text: of the later of two replies that start at the same time, in milliseconds."
    )
    columns = ("forward passes per slice", "speed (range)", "CPU time", "first text")
    return Table("Two replies at a time", columns, rows, caption)
