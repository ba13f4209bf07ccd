"""Losses of whole books under each policy, kept in files so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.perplexity import ScoredDocument, score_all
from streamchat.benchmarks.score import Scores
from streamchat.benchmarks.texts import Document, Tokens, read_documents, tokenize

BUDGET = 512
SINKS = (1, 2, 4, 8)
BUDGETS = (128, 256, 1024, 2048)
POLICIES = (
    Method("sinks", BUDGET, 4),
    Method("window", BUDGET),
    Method("dense"),
    Method("no-rerotation", BUDGET, 4),
    *(Method("sinks", BUDGET, sinks) for sinks in SINKS if sinks != 4),
    *(Method("sinks", budget, 4) for budget in BUDGETS),
    Method("recompute", BUDGET),
)


def body(document: Document) -> Document:
    """A book of Project Gutenberg without header and license, from its title page on."""
    text = document.text
    if match := re.search(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK[^*]*\*\*\*", text):
        text = text[match.end() :]
    if match := re.search(
        r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK|End of (?:the )?Project Gutenberg", text
    ):
        text = text[: match.start()]
    return Document(document.name, text.strip() + "\n", document.notes)


def books(paths: Sequence[str], tokenizer: Any, most: int) -> list[Tokens]:
    """The books as ids."""
    return [tokenize(body(document), tokenizer, most) for document in read_documents(paths)]


def score_books(
    loaded: Any,
    fit: Any,
    documents: Sequence[Tokens],
    chunk: int,
    folder: Path,
    tick: Any,
    policies: Sequence[Method] = POLICIES,
) -> list[ScoredDocument]:
    """Score all books under all policies. Results that are in `folder` are not run again."""
    found = []
    for policy in policies:
        for document in documents:
            # reading the window again costs a whole window a chunk
            size = policy.budget // 4 if policy.kind == "recompute" else chunk
            question = f"{loaded.source} {loaded.dtype} {policy.spec} {size} {document.ids}"
            path = folder / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.npz"
            if path.exists():
                with np.load(path) as kept:
                    numbers = [kept[name].item() for name in ("unscorable", "longest", "kv_bytes", "seconds")]
                    scores = Scores(kept["losses"], *numbers)
            else:
                results = score_all(loaded.model, fit, [document], [policy], size, lambda *_: None)
                scores = next(iter(results)).scores
                np.savez(
                    path,
                    losses=scores.losses,
                    unscorable=scores.unscorable,
                    longest=scores.longest,
                    kv_bytes=scores.kv_bytes,
                    seconds=scores.seconds,
                )
            found.append(ScoredDocument(policy, document, scores))
            tick(f"{policy.name}, {document.name}: perplexity {found[-1].perplexity:.2f}, {scores.seconds:.0f} s")
    return found
