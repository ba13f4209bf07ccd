"""The section of docs/evidence.md about eviction policies: perplexity at equal budgets, and what is forgotten.

    python -m tools.evidence.policies BOOK.txt BOOK.txt --kept FOLDER

Measures every policy that is registered. Results are kept in FOLDER as they come. The section replaces the one between
the marks in the page, and its numbers are written to docs/evidence/policies.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from streamchat.base.eviction_policies import POLICIES
from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.methods.streaming import TURN_TOKENS
from streamchat.benchmarks.perplexity import ScoredDocument, of_method
from streamchat.benchmarks.score import perplexity
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import load_model
from streamchat.models.quiet import quiet
from streamchat.reports.page import Table
from tools.evidence.forgetting import ask
from tools.evidence.markdown import as_markdown
from tools.evidence.runs import books, score_books

DOCS = Path(__file__).parents[2] / "docs"
BUDGETS = (256, 512, 1024)
SINKS = 4
ASKED_BUDGET = 256
DISTANCES = (128, 512)
TRIALS = 8
LEAD = 96
"""Tokens before the fact in the second half of the trials: the fact is then in the second turn."""
BEGIN, END = "<!-- policies: begin -->", "<!-- policies: end -->"


def main() -> int:
    """Run what is missing, and write the section."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.evidence.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("books", nargs="+", metavar="BOOK.txt")
    parser.add_argument("--kept", type=Path, required=True, metavar="FOLDER", help="folder of results")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per book (default: 4096)")
    parser.add_argument("--processor", required=True, help="name of the processor, for the page")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page (default: docs)")
    args = parser.parse_args()
    args.kept.mkdir(parents=True, exist_ok=True)
    data = _measure(args)
    (args.docs / "evidence").mkdir(parents=True, exist_ok=True)
    (args.docs / "evidence" / "policies.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = args.docs / "evidence.md"
    page.write_text(with_section(page.read_text(encoding="utf-8"), section(data)), encoding="utf-8")
    print(page)
    return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()

    def tick(what: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {what}", flush=True)

    loaded = load_model("default")
    policies = [Method(name, budget, SINKS) for budget in BUDGETS for name in POLICIES]
    with quiet():
        fit = choose_checked_fit(loaded.model)
        documents = books(args.books, loaded.tokenizer, args.tokens)
        results = score_books(loaded, fit, documents, TURN_TOKENS, args.kept, tick, policies)
        asked = {}
        for lead in (0, LEAD):
            kept = args.kept / f"asked-{lead}.json"
            if not kept.exists():
                filler = loaded.tokenizer.decode(documents[-1].ids)
                assert isinstance(filler, str)
                rows = ask(
                    loaded.model,
                    loaded.tokenizer,
                    fit,
                    filler,
                    tick,
                    policies=[Method(name, ASKED_BUDGET, SINKS) for name in POLICIES],
                    distances=DISTANCES,
                    trials=TRIALS,
                    lead=lead,
                )
                kept.write_text(json.dumps([{**asdict(row), "policy": row.policy.kind} for row in rows]))
            asked[lead] = json.loads(kept.read_text())
    return {
        "model": loaded.name,
        "dtype": loaded.dtype,
        "processor": args.processor,
        "threads": torch.get_num_threads(),
        "tokens": args.tokens,
        "books": [document.name for document in documents],
        "perplexity": [_row(results, policy) for policy in policies],
        "forgetting": [{"lead": lead, **row} for lead, rows in asked.items() for row in rows],
    }


def _row(results: Sequence[ScoredDocument], policy: Method) -> dict[str, Any]:
    own = of_method(results, policy)
    return {
        "policy": policy.kind,
        "budget": policy.budget,
        "perplexity": perplexity(np.concatenate([result.scores.losses for result in own])),
        "books": {result.document.name: result.perplexity for result in own},
    }


def with_section(page: str, text: str) -> str:
    """Return the page with `text` between the marks; at its end if it has none."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{BEGIN}\n{text.strip()}\n{END}\n"
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.split(END, 1)[1]}"


def section(data: dict[str, Any]) -> str:
    """Return the section as Markdown."""
    found = {(row["policy"], row["budget"]): row["perplexity"] for row in data["perplexity"]}
    names = list(dict.fromkeys(row["policy"] for row in data["perplexity"]))
    budgets = sorted({row["budget"] for row in data["perplexity"]})
    losses = {(row["policy"], row["lead"], row["distance"]): row["loss"] for row in data["forgetting"]}
    places = list(dict.fromkeys((row["lead"], row["distance"]) for row in data["forgetting"]))
    by_budget = [(name, *(f"{found[name, budget]:.2f}" for budget in budgets)) for name in names]
    by_place = [(name, *(f"{losses[name, *place]:.2f}" for place in places)) for name in names]
    heads = [f"{'later' if lead else 'first'}, {distance}" for lead, distance in places]
    source = (Path(__file__).parent / "policies.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"figure": "{:.2f}".format, "count": "{:,}".format}
    return environment.from_string(source).render(
        data=data,
        turn=TURN_TOKENS,
        sinks=SINKS,
        asked_budget=ASKED_BUDGET,
        trials=TRIALS,
        lead=LEAD,
        budget_list=_listed([f"{budget:,}" for budget in budgets]),
        lowest=_listed([f"`{min(names, key=lambda name: found[name, budget])}`" for budget in budgets]),
        against=lambda policy: _listed(
            [_compared(found[policy, budget] / found["oldest-turns", budget] - 1) for budget in budgets]
        ),
        verdict=_verdict(data["forgetting"]),
        budgets=as_markdown(Table("", ("", *(f"{budget:,} tokens" for budget in budgets)), tuple(by_budget))),
        asked=as_markdown(Table("", ("", *heads), tuple(by_place))),
    )


def _listed(words: Sequence[str]) -> str:
    """Return the words as a list in a sentence; one if they are all the same."""
    if len(set(words)) == 1:
        return words[0]
    return f"{', '.join(words[:-1])}, and {words[-1]}"


def _compared(change: float) -> str:
    return f"{100 * abs(change):.1f} % {'higher' if change > 0 else 'lower'}"


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Return in how many trials each policy knew every digit, as sentences."""
    shares = {(row["policy"], row["lead"], row["distance"]): row["known"] for row in rows}
    near, late = min(DISTANCES), max(DISTANCES)

    def counts(lead: int, distance: int) -> str:
        known = {name: round(TRIALS * shares[name, lead, distance]) for name in POLICIES}
        return ", ".join(f"`{name}` {count}" for name, count in known.items())

    return textwrap.fill(
        f"Of {TRIALS} trials each, the model gave every digit more than half of the probability in these numbers: over "
        f"{late} tokens, for the first fact, {counts(0, late)}; for the later one, {counts(LEAD, late)}. Over {near} "
        f"tokens, for the later one, {counts(LEAD, near)}: what a policy keeps for longer takes the place of something "
        "newer. `keep-first-turn` knows the first fact because it is in the first turn; the test suits it. Pin what "
        "must stay, whatever the policy: none of them knows what will be asked.",
        120,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    sys.exit(main())
