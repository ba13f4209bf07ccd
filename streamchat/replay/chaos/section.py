"""The part of the report about chaos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from streamchat.base.formatting import plural
from streamchat.replay.chaos.check import Kept
from streamchat.replay.chaos.kind import Kind
from streamchat.replay.chaos.log import ChaosLog
from streamchat.replay.chaos.slopes import Slope
from streamchat.reports.page import Table

SHOWN = 300
"""Maximum number of disturbances on the page; `report.json` has all of them."""


def chaos_section(
    seed: int, kinds: Sequence[Kind], log: ChaosLog, slopes: Sequence[Slope], kept: Kept
) -> dict[str, Any]:
    """Return the object `chaos` of `report.json`."""
    counts = Counter(each["kind"] for each in log.disturbances)
    return {
        "seed": seed,
        "kinds": [
            {"name": kind.name, "what": kind.what, "count": counts[kind.name], "skipped": kind.missing()}
            for kind in kinds
        ],
        "slopes": [slope.as_dict() | {"text": slope_line(slope)} for slope in slopes],
        "kept": kept.as_dict(),
        "notices": dict(log.notices.most_common()),
        "disturbances": log.disturbances,
    }


def slope_line(slope: Slope) -> str:
    """Return a slope as text."""
    if slope.change is None or slope.low is None or slope.high is None:
        return f"too few figures ({slope.figures})"
    interval = f"{slope.show(slope.low)} to {slope.show(slope.high)}"
    zero = "includes 0" if slope.includes_zero else "does not include 0"
    change = slope.show(slope.change)
    median = "" if slope.unit == "share" or slope.median is None else f"; median {slope.show(slope.median)}"
    return f"{change} over {plural(slope.turns, 'turn')} (99 % interval {interval}: {zero}){median}"


def chaos_lines(chaos: dict[str, Any]) -> list[str]:
    """Return the result as lines for a terminal."""
    counts = [f"{kind['count']} x {kind['name']}" for kind in chaos["kinds"] if not kind["skipped"]]
    skipped = [f"{kind['name']} skipped: {kind['skipped']}" for kind in chaos["kinds"] if kind["skipped"]]
    lines = [f"chaos, seed {chaos['seed']}: {'; '.join([', '.join(counts), *skipped])}"]
    width = max(len(slope["name"]) for slope in chaos["slopes"])
    lines += [f"  {slope['name']:<{width}}  {slope['text']}" for slope in chaos["slopes"]]
    kept = chaos["kept"]
    lines.append(f"  {'checked':<{width}}  {plural(kept['turns'], 'turn')} compared; reopened: {kept['reopened']}")
    return lines + [f"  {'LOST':<{width}}  {fault}" for fault in kept["faults"]]


def chaos_tables(chaos: dict[str, Any]) -> list[Table]:
    """Return the tables of the page."""
    kinds = [(kind["name"], kind["skipped"] or str(kind["count"]), kind["what"]) for kind in chaos["kinds"]]
    slopes = [(slope["name"], slope["text"]) for slope in chaos["slopes"]]
    kept = [("finished turns compared with the database", f"{chaos['kept']['turns']:,}")]
    kept += [("opened in a new process", chaos["kept"]["reopened"])]
    kept += [("lost", fault) for fault in chaos["kept"]["faults"]]
    done = [
        (f"{each['turn']:,}", str(each["piece"]), each["kind"], each["what"]) for each in chaos["disturbances"][:SHOWN]
    ]
    left_out = len(chaos["disturbances"]) - len(done)
    more = plural(left_out, "later disturbance is", "later disturbances are")
    caption = f"{more} in report.json." if left_out else ""
    notices = [(str(count), text) for text, count in chaos["notices"].items()]
    tables = [
        Table(f"Chaos, seed {chaos['seed']}", ("kind", "count", "what it does"), kinds),
        Table(
            "Slopes",
            ("figure", "change"),
            slopes,
            "Theil-Sen over medians of blocks of turns, with Sen's interval. Times leave out disturbed turns.",
        ),
        Table("Nothing lost", ("check", "result"), kept),
        Table("Disturbances", ("turn", "piece of the reply", "kind", "what"), done, caption),
    ]
    return [*tables, Table("Notices", ("count", "notice"), notices)] if notices else tables
