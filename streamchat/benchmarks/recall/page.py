"""Runs all measurements of `streamchat recall-bench`, and shows them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from streamchat.base.formatting import plural
from streamchat.base.paths import user_path
from streamchat.base.progress import Progress
from streamchat.benchmarks.loading import about, cache_size, heading, load_in_thread
from streamchat.benchmarks.recall.filler import make_facts, read_turns
from streamchat.benchmarks.recall.forced import ForcedChat
from streamchat.benchmarks.recall.measure import (
    CostFigures,
    DigitFigures,
    TimeFigures,
    measure_cost,
    measure_dense,
    measure_digits,
    measure_time,
)
from streamchat.benchmarks.recall.ranks import BEST, RankFigures, measure_ranks
from streamchat.config.loader import Configuration
from streamchat.reports.page import Page, Table, facts

DENSE_ROOM = 1536
"""Tokens of a dense cache beyond the distance, because the last turn before the question may far exceed it."""
REPLY_TOKENS = 48
"""Tokens of each ordinary reply that are scored."""
NAMES = {
    "off": "evicted",
    "text": "quoted as text",
    "by hand": "recalled by hand (/retry N)",
    "on": "auto_recall = on",
    "dense": "never evicted (dense)",
}
QUESTIONS = {
    "digits": "for a number, in its words",
    "direct": "for other facts, in their words",
    "paraphrased": "for these facts, in other words",
}


def measure(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure everything with one loaded model.

    Raises:
        ConfigError: A file cannot be read, or has no turns.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    paths = [user_path(path) for path in args.files]
    asked = make_facts(args.facts, args.seed)
    sources = [read_turns(paths, args.seed + number) for number in range(3)]
    ordinary = read_turns(paths[:1], args.seed + 3)
    loaded = load_in_thread(configuration, progress)
    size, _ = cache_size(configuration, loaded)
    chat = ForcedChat(configuration, loaded, size)
    ranks = measure_ranks(loaded.tokenizer, args.ranked, sources[0], args.seed + 1)
    digits = measure_digits(chat, asked, args.distances, sources[1], progress)
    times = measure_time(chat, asked)
    near = [distance for distance in args.distances if distance <= args.dense]
    if near:
        dense = ForcedChat(configuration, loaded, max(near) + DENSE_ROOM)
        digits += measure_dense(dense, asked, near, sources[2], progress)
    cost = None
    if args.chat_turns:
        chat.start_over()
        cost = measure_cost(chat, ordinary, args.chat_turns, REPLY_TOKENS, progress)
    sizes = f"cache_size {size:,}", plural(args.facts, "fact"), f"seed {args.seed}"
    data: dict[str, Any] = about(
        "recall-bench",
        loaded,
        cache_size=size,
        recall_share=configuration.settings.recall_share,
        files=[path.name for path in paths],
        seed=args.seed,
        digits=[asdict(each) | {"mean": each.mean} for each in digits],
        ranks=[asdict(each) for each in ranks],
        times=asdict(times),
        cost=None if cost is None else asdict(cost),
    )
    tables = [_nats(digits, args.distances), _exact(digits, args.distances), _ranks(ranks), _costs(times, cost)]
    return Page(
        "recall-bench", "Recalling evicted turns", heading(loaded, *sizes), tables, notes=[*loaded.notes], data=data
    )


def _nats(digits: Sequence[DigitFigures], distances: Sequence[int]) -> Table:
    rows = [
        (NAMES[way], *(f"{each.mean:.2f}" if each else "-" for each in row)) for way, row in _rows(digits, distances)
    ]
    return Table("Nats per digit, by the tokens between number and question", _columns(distances), rows)


def _exact(digits: Sequence[DigitFigures], distances: Sequence[int]) -> Table:
    rows = [
        (NAMES[way], *(f"{each.exact} of {len(each.nats)}" if each else "-" for each in row))
        for way, row in _rows(digits, distances)
    ]
    return Table("Right numbers: each digit is the most likely token", _columns(distances), rows)


def _rows(digits: Sequence[DigitFigures], distances: Sequence[int]) -> list[tuple[str, list[DigitFigures | None]]]:
    found = {(each.way, each.distance): each for each in digits}
    ways = [way for way in NAMES if any(each.way == way for each in digits)]
    return [(way, [found.get((way, distance)) for distance in distances]) for way in ways]


def _columns(distances: Sequence[int]) -> list[str]:
    return ["", *(f"{distance:,}" for distance in distances)]


def _ranks(ranks: Sequence[RankFigures]) -> Table:
    rows = [
        (
            f"{QUESTIONS[each.kind]} ({each.questions} questions, {each.turns:,} turns)",
            *(f"{count}" for count in (each.ranked_first, each.ranked, each.bm25_first, each.bm25)),
        )
        for each in ranks
    ]
    columns = ["", "ranking: first", f"in the first {BEST}", "BM25: first", f"in the first {BEST}"]
    return Table("Rank of the right turn, by the kind of question", columns, rows)


def _costs(times: TimeFigures, cost: CostFigures | None) -> Table:
    values: dict[str, object] = {
        f"first token after {times.turns:,} turns, without recall (median)": _ms(times.off_s),
        f"with recall of {times.tokens:.0f} tokens": _ms(times.on_s),
        "difference (median of pairs)": _difference(times.off_s, times.on_s),
        "difference in CPU time of the model's thread": _difference(times.off_cpu_s, times.on_cpu_s),
    }
    if cost is not None:
        values |= {
            "messages of ordinary chat with recalled turns": f"{cost.recalled} of {cost.turns}",
            "perplexity of its replies, without recall": f"{cost.perplexity_off:.3f}",
            "with recall": f"{cost.perplexity_on:.3f}",
        }
    return facts("Cost", values)


def _difference(before: Sequence[float], after: Sequence[float]) -> str:
    return _ms([b - a for a, b in zip(before, after, strict=True)])


def _ms(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f} ms"
